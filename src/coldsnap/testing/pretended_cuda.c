// A CUDA driver without a device: libcuda.so.1, as far as it can be loaded, asked for its version and told to begin.
//
// PRETENDED_CALLS names a file to which every call is appended as a line, "<process id> <function>", and after cuInit
// this library's own path: where there are several, it says which was found. cuInit answers that there is no device,
// so whatever would run on a GPU ends there. Where PRETENDED_STACKS is set it also raises SIGUSR1, for whoever wants to
// know what has called it.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NO_DEVICE = 100 };

static void note(const char *function) {
    const char *path = getenv("PRETENDED_CALLS");
    FILE *file = path ? fopen(path, "a") : NULL;
    if (file) {
        fprintf(file, "%d %s\n", getpid(), function);
        fclose(file);
    }
}

int cuInit(unsigned flags) {
    Dl_info self;
    note("cuInit");
    if (dladdr((void *)cuInit, &self)) note(self.dli_fname);
    if (getenv("PRETENDED_STACKS")) raise(SIGUSR1);
    return NO_DEVICE;
}

int cuDriverGetVersion(int *version) {
    const char *cuda = getenv("PRETENDED_CUDA");
    note("cuDriverGetVersion");
    *version = cuda ? atoi(cuda) : 13000;
    return SUCCESS;
}

int cuGetErrorName(int error, const char **name) {
    *name = "CUDA_ERROR_NO_DEVICE";
    return SUCCESS;
}

int cuGetErrorString(int error, const char **text) {
    *text = "no CUDA-capable device is detected (a pretended driver)";
    return SUCCESS;
}

static int unknown(void) {
    note("another function");
    return NO_DEVICE;
}

// CUDA's runtime links to nothing: it asks for each function by the name without its version.
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *found) {
    void *self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    char versioned[128];
    snprintf(versioned, sizeof versioned, "%s_v2", name);
    *function = self ? dlsym(self, name) : NULL;
    if (!*function && self) *function = dlsym(self, versioned);
    if (!*function) *function = unknown;
    if (found) *found = 0;
    return SUCCESS;
}

int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

// What the libraries of torch, vLLM, Triton and FlashInfer must find to be loaded.
#define WITHOUT_A_DEVICE(function) \
    int function(void) { note(#function); return NO_DEVICE; }
WITHOUT_A_DEVICE(cuCtxGetCurrent)
WITHOUT_A_DEVICE(cuCtxGetDevice)
WITHOUT_A_DEVICE(cuCtxGetId)
WITHOUT_A_DEVICE(cuCtxPopCurrent_v2)
WITHOUT_A_DEVICE(cuCtxPushCurrent_v2)
WITHOUT_A_DEVICE(cuCtxSetCurrent)
WITHOUT_A_DEVICE(cuDeviceGet)
WITHOUT_A_DEVICE(cuDeviceGetAttribute)
WITHOUT_A_DEVICE(cuDeviceGetCount)
WITHOUT_A_DEVICE(cuDeviceGetName)
WITHOUT_A_DEVICE(cuDeviceGetUuid)
WITHOUT_A_DEVICE(cuDeviceGetUuid_v2)
WITHOUT_A_DEVICE(cuDevicePrimaryCtxGetState)
WITHOUT_A_DEVICE(cuDevicePrimaryCtxRelease_v2)
WITHOUT_A_DEVICE(cuDevicePrimaryCtxRetain)
WITHOUT_A_DEVICE(cuDeviceTotalMem_v2)
WITHOUT_A_DEVICE(cuFuncGetAttribute)
WITHOUT_A_DEVICE(cuFuncSetAttribute)
WITHOUT_A_DEVICE(cuFuncSetCacheConfig)
WITHOUT_A_DEVICE(cuGetExportTable)
WITHOUT_A_DEVICE(cuKernelGetFunction)
WITHOUT_A_DEVICE(cuLaunchCooperativeKernel)
WITHOUT_A_DEVICE(cuLaunchKernel)
WITHOUT_A_DEVICE(cuLaunchKernelEx)
WITHOUT_A_DEVICE(cuLibraryLoadData)
WITHOUT_A_DEVICE(cuLinkAddData_v2)
WITHOUT_A_DEVICE(cuLinkComplete)
WITHOUT_A_DEVICE(cuLinkCreate_v2)
WITHOUT_A_DEVICE(cuLinkDestroy)
WITHOUT_A_DEVICE(cuMemAddressFree)
WITHOUT_A_DEVICE(cuMemAddressReserve)
WITHOUT_A_DEVICE(cuMemAlloc_v2)
WITHOUT_A_DEVICE(cuMemCreate)
WITHOUT_A_DEVICE(cuMemExportToShareableHandle)
WITHOUT_A_DEVICE(cuMemFree_v2)
WITHOUT_A_DEVICE(cuMemGetAllocationGranularity)
WITHOUT_A_DEVICE(cuMemGetInfo_v2)
WITHOUT_A_DEVICE(cuMemImportFromShareableHandle)
WITHOUT_A_DEVICE(cuMemMap)
WITHOUT_A_DEVICE(cuMemRelease)
WITHOUT_A_DEVICE(cuMemSetAccess)
WITHOUT_A_DEVICE(cuMemUnmap)
WITHOUT_A_DEVICE(cuModuleGetFunction)
WITHOUT_A_DEVICE(cuModuleLoad)
WITHOUT_A_DEVICE(cuModuleLoadData)
WITHOUT_A_DEVICE(cuModuleLoadDataEx)
WITHOUT_A_DEVICE(cuModuleUnload)
WITHOUT_A_DEVICE(cuMulticastAddDevice)
WITHOUT_A_DEVICE(cuMulticastBindMem)
WITHOUT_A_DEVICE(cuMulticastCreate)
WITHOUT_A_DEVICE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
WITHOUT_A_DEVICE(cuPointerGetAttribute)
WITHOUT_A_DEVICE(cuStreamCreate)
WITHOUT_A_DEVICE(cuStreamWriteValue32_v2)
WITHOUT_A_DEVICE(cuTensorMapEncodeIm2col)
WITHOUT_A_DEVICE(cuTensorMapEncodeTiled)
