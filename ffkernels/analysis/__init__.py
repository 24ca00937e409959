"""The paper's figures and sections: functions that return data, and ``ffkernels analyze``, which plots it."""
