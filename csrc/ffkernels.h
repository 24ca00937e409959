/* The C ABI between the Python package and its compiled kernels.
 *
 * A table of tensors is a list of groups, one per storage dtype; a group is a list of rows, one per chunk of one
 * tensor. A row is four int64: the addresses of the chunk in W, delta and best, and its element count. Plain integers
 * and pointers only: one binary serves every torch version, and loading it needs nothing but the C library (the GPU's
 * library: nor a GPU).
 *
 * Every entry point walks all groups in one call, so no signal handler of the interpreter can run half way through
 * a weight move. All return 0, or a negative FFK_E code before anything was written.
 */
#ifndef FFKERNELS_H
#define FFKERNELS_H

#include <stdint.h>

/* Raised whenever a signature or a layout below changes; the loader refuses any other number. */
#define FFK_ABI 3

#define FFK_E_DTYPE (-1)
#define FFK_E_ROWS (-2)

/* Elements that the CPU adds up by themselves in an alignment. */
#define FFK_BLOCK 1024

/* Rows whose sums a GPU adds up together. */
#define FFK_SEGMENT 128

#if defined(__GNUC__)
#define FFK_API __attribute__((visibility("default")))
#else
#define FFK_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Float64 is for alignment alone; the other moves compute in float32 and refuse it. */
enum ffk_dtype { FFK_FLOAT32 = 0, FFK_BFLOAT16 = 1, FFK_FLOAT16 = 2, FFK_FLOAT64 = 3 };

/* w, delta or best may be 0 where the operation does not read or write it. */
typedef struct {
  int64_t w, delta, best, n;
} ffk_row;

/* Where a row lies: in which tensor, from which of its elements on, and which of the group's blocks of FFK_BLOCK
 * elements is its first; blocks do not reach from one tensor into the next. */
typedef struct {
  int64_t tensor, start, block;
} ffk_place;

typedef struct {
  const ffk_row* rows;
  const ffk_place* places;
  int64_t count;
  int64_t dtype;
} ffk_group;

/* The gradient of one tensor, contiguous, and the ffk_dtype of its elements; `at` is 0 where there is none. */
typedef struct {
  int64_t at, dtype;
} ffk_gradient;

FFK_API int32_t ffk_abi(void);

/* The digest of the sources this library was built from, as the build passed it in. */
FFK_API const char* ffk_source_id(void);

/* 1 when the kernels can use more than one thread. */
FFK_API int32_t ffk_cpu_threaded(void);

/* Limits the instruction set to 0 (the architecture's baseline), 1 (AVX2) or 2 (AVX-512); a negative limit changes
 * nothing. Returns the level in use, which never exceeds what the processor has. */
FFK_API int32_t ffk_cpu_isa(int32_t limit);

/* best <- W */
FFK_API int32_t ffk_cpu_checkpoint(const ffk_group* groups, int64_t count, int32_t threads);

/* delta <- W - best ; best <- W */
FFK_API int32_t ffk_cpu_delta(const ffk_group* groups, int64_t count, int32_t threads);

/* base = accept ? W : best ; best <- base ; W <- base + k * delta, where k == 0 copies base bit for bit */
FFK_API int32_t ffk_cpu_step(const ffk_group* groups, int64_t count, int32_t accept, float k, int32_t threads);

/* out <- max |delta|, NaN when any element is NaN, 0 when there is none */
FFK_API int32_t ffk_cpu_absmax(const ffk_group* groups, int64_t count, int32_t threads, float* out);

/* out <- <g, d>, <g, g>, <d, d> over all groups, with d = W - best ; best <- W. `gradients` has one entry for each
 * tensor. `scratch` holds three numbers for each block of the largest group. */
FFK_API int32_t ffk_cpu_align(const ffk_group* groups, int64_t count, const ffk_gradient* gradients, double* scratch,
                              double* out, int32_t threads);

/* The same moves on a GPU, in a library of their own: `rows` of each group are in the device's memory, the groups
 * themselves in the host's. The device that holds the rows must be the calling thread's current one. One launch per
 * group, on `stream` (a cudaStream_t of that device), nothing waited for. They return 0, an FFK_E code before anything
 * was launched, or a cudaError_t. */
FFK_API int32_t ffk_cuda_abi(void);
FFK_API const char* ffk_cuda_source_id(void);
FFK_API const char* ffk_cuda_error_string(int32_t code);

/* Loads every kernel on the current device, which must not happen for the first time while a graph is captured. The
 * error tells whether the library can run there at all. */
FFK_API int32_t ffk_cuda_prepare(void);

FFK_API int32_t ffk_cuda_checkpoint(const ffk_group* groups, int64_t count, void* stream);
FFK_API int32_t ffk_cuda_delta(const ffk_group* groups, int64_t count, void* stream);

/* accept_at and k_at point into the device's memory, or are null: then accept and k hold. */
FFK_API int32_t ffk_cuda_step(const ffk_group* groups, int64_t count, const int32_t* accept_at, const float* k_at,
                              int32_t accept, float k, void* stream);

/* `gradients`, `scratch`, `tickets` and `out` are in the device's memory. `scratch` holds three numbers for each row of
 * the largest group and for each FFK_SEGMENT of its rows, `tickets` one for each of these segments and one more; they
 * are 0 before the first call, and after each. */
FFK_API int32_t ffk_cuda_align(const ffk_group* groups, int64_t count, const ffk_gradient* gradients, double* scratch,
                               uint32_t* tickets, double* out, void* stream);

#ifdef __cplusplus
}
#endif

#endif
