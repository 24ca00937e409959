; The device runtime's cudaGraphSetConditional for Triton kernels; one thread writes, as the runtime demands.
target datalayout = "e-p6:32:32-i64:64-i128:128-i256:256-v16:16-v32:32-n16:32:64"
target triple = "nvptx64-nvidia-cuda"

declare void @cudaGraphSetConditional(i64, i32)
declare i32 @llvm.nvvm.read.ptx.sreg.tid.x()

define i32 @ffk_set_condition(i64 %handle, i32 %value) {
entry:
  %thread = call i32 @llvm.nvvm.read.ptx.sreg.tid.x()
  %first = icmp eq i32 %thread, 0
  br i1 %first, label %set, label %done
set:
  call void @cudaGraphSetConditional(i64 %handle, i32 %value)
  br label %done
done:
  ret i32 %value
}
