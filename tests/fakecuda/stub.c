/* One GPU that is not there: enough of the CUDA runtime and driver for autograd, generators, streams and events of torch
 * to run over tensors without data. Loaded before the real runtime (LD_PRELOAD), and as libcuda.so.1. Nothing is computed:
 * memory is the host's, kernels are never launched, every wait is over at once. */
#include <stdlib.h>
#include <string.h>

enum { MAJOR = 9, MINOR = 0, PROCESSORS = 132, WARP = 32, PROPERTIES = 1008 };
enum { ATTRIBUTE_PROCESSORS = 16, ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76 };
enum { NAME_AT = 0, MEMORY_AT = 288, WARP_AT = 308, MAJOR_AT = 360, MINOR_AT = 364 }; /* in cudaDeviceProp */
static const size_t MEMORY = (size_t)80 << 30;

#define FINE(name) int name(void) { return 0; }
#define HANDLE(name) int name(void **made) { *made = malloc(1); return 0; } /* further arguments do not matter */
#define NUMBER(name, value) int name(int *answer) { *answer = value; return 0; }

NUMBER(cudaGetDeviceCount, 1)
NUMBER(cudaGetDevice, 0)
NUMBER(cudaDriverGetVersion, 13020)
HANDLE(cudaStreamCreate)
HANDLE(cudaStreamCreateWithFlags)
HANDLE(cudaStreamCreateWithPriority)
HANDLE(cudaEventCreate)
HANDLE(cudaEventCreateWithFlags)
FINE(cudaSetDevice)
FINE(cudaGetLastError)
FINE(cudaPeekAtLastError)
FINE(cudaDeviceSynchronize)
FINE(cudaStreamSynchronize)
FINE(cudaStreamQuery)
FINE(cudaStreamDestroy)
FINE(cudaStreamWaitEvent)
FINE(cudaEventRecord)
FINE(cudaEventRecordWithFlags)
FINE(cudaEventQuery)
FINE(cudaEventSynchronize)
FINE(cudaEventDestroy)
FINE(cudaThreadExchangeStreamCaptureMode)
FINE(cudaHostRegister)
FINE(cudaHostUnregister)

int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamIsCapturing(void *stream, int *answer) { *answer = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *answer) { *answer = 0; return 0; }
int cudaStreamGetCaptureInfo_v2(void *stream, int *answer) { *answer = 0; return 0; }
int cudaStreamGetCaptureInfo_v3(void *stream, int *answer) { *answer = 0; return 0; }
int cudaDeviceCanAccessPeer(int *answer, int device, int peer) { *answer = 0; return 0; }
int cudaEventElapsedTime(float *ms, void *start, void *end) { *ms = 1; return 0; }
int cudaEventElapsedTime_v2(float *ms, void *start, void *end) { *ms = 1; return 0; }
int cudaMemGetInfo(size_t *unused, size_t *all) { *unused = *all = MEMORY; return 0; }
int cudaMalloc(void **made, size_t size) { *made = calloc(1, size + 1); return 0; }
int cudaHostAlloc(void **made, size_t size, unsigned flags) { *made = calloc(1, size + 1); return 0; }
int cudaFree(void *made) { free(made); return 0; }
int cudaFreeHost(void *made) { free(made); return 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { memcpy(to, from, size); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) { memcpy(to, from, size); return 0; }
int cudaMemsetAsync(void *to, int value, size_t size, void *stream) { memset(to, value, size); return 0; }
int cudaFuncGetAttributes(void *attributes, const void *kernel) { memset(attributes, 0, 128); return 0; }

int cudaDeviceGetAttribute(int *answer, int which, int device) {
    *answer = which == ATTRIBUTE_MAJOR ? MAJOR : which == ATTRIBUTE_MINOR ? MINOR : which == ATTRIBUTE_PROCESSORS ? PROCESSORS : 1;
    return 0;
}

int cudaGetDeviceProperties(char *properties, int device) {
    memset(properties, 0, PROPERTIES);
    strcpy(properties + NAME_AT, "GPU without a driver");
    *(size_t *)(properties + MEMORY_AT) = MEMORY;
    *(int *)(properties + WARP_AT) = WARP;
    *(int *)(properties + MAJOR_AT) = MAJOR;
    *(int *)(properties + MINOR_AT) = MINOR;
    return 0;
}
int cudaGetDeviceProperties_v2(char *properties, int device) { return cudaGetDeviceProperties(properties, device); }

/* the driver: asked whether the device has a context, and otherwise only looked up */
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
FINE(cuCtxGetCurrent)
FINE(cuCtxSetCurrent)
FINE(cuDeviceGet)
FINE(cuDeviceGetAttribute)
FINE(cuDevicePrimaryCtxRetain)
FINE(cuFuncGetAttribute)
FINE(cuFuncSetAttribute)
FINE(cuFuncSetCacheConfig)
FINE(cuGetErrorString)
FINE(cuLaunchCooperativeKernel)
FINE(cuLaunchKernel)
FINE(cuLinkAddData_v2)
FINE(cuLinkComplete)
FINE(cuLinkCreate_v2)
FINE(cuModuleGetFunction)
FINE(cuModuleLoad)
FINE(cuModuleLoadData)
FINE(cuModuleLoadDataEx)
FINE(cuModuleUnload)
FINE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
FINE(cuPointerGetAttribute)
FINE(cuTensorMapEncodeTiled)
