// The driver's management library, libnvidia-ml.so.1, with GPUs that are not there.
//
// The environment describes them: PRETENDED_GPUS (how many), PRETENDED_GPU (name), PRETENDED_CAPABILITY ("9.0"),
// PRETENDED_MEMORY (bytes), PRETENDED_CUDA (1000 times major plus 10 times minor). Each draws 300 W.

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3 };
enum { WATTS = 300 };

typedef unsigned int u32;
typedef unsigned long long u64;

static const char *setting(const char *name, const char *otherwise) {
    const char *value = getenv(name);
    return value && *value ? value : otherwise;
}

static u32 gpus(void) { return (u32)atoi(setting("PRETENDED_GPUS", "1")); }
static u32 number(void *device) { return (u32)(long)device - 1; } // a handle must not be NULL
static void *handle(u32 number) { return (void *)(long)(number + 1); }

int nvmlInit_v2(void) { return SUCCESS; }
int nvmlInit(void) { return SUCCESS; }
int nvmlInitWithFlags(u32 flags) { return SUCCESS; }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int error) { return error == NOT_SUPPORTED ? "Not Supported" : "Invalid Argument"; }

int nvmlSystemGetDriverVersion(char *version, u32 size) {
    snprintf(version, size, "580.105.08");
    return SUCCESS;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
    *version = atoi(setting("PRETENDED_CUDA", "13000"));
    return SUCCESS;
}
int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

int nvmlDeviceGetCount_v2(u32 *count) {
    *count = gpus();
    return SUCCESS;
}
int nvmlDeviceGetCount(u32 *count) { return nvmlDeviceGetCount_v2(count); }

int nvmlDeviceGetHandleByIndex_v2(u32 index, void **device) {
    *device = handle(index);
    return index < gpus() ? SUCCESS : INVALID_ARGUMENT;
}
int nvmlDeviceGetHandleByIndex(u32 index, void **device) { return nvmlDeviceGetHandleByIndex_v2(index, device); }

int nvmlDeviceGetUUID(void *device, char *uuid, u32 size) {
    snprintf(uuid, size, "GPU-%08x-0000-0000-0000-000000000000", number(device));
    return SUCCESS;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    u32 index;
    if (sscanf(uuid, "GPU-%8x", &index) != 1) return INVALID_ARGUMENT;
    return nvmlDeviceGetHandleByIndex_v2(index, device);
}

int nvmlDeviceGetIndex(void *device, u32 *index) {
    *index = number(device);
    return SUCCESS;
}
int nvmlDeviceGetMinorNumber(void *device, u32 *minor) { return nvmlDeviceGetIndex(device, minor); }

int nvmlDeviceGetName(void *device, char *name, u32 size) {
    snprintf(name, size, "%s", setting("PRETENDED_GPU", "NVIDIA H100 80GB HBM3"));
    return SUCCESS;
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
    return sscanf(setting("PRETENDED_CAPABILITY", "9.0"), "%d.%d", major, minor) == 2 ? SUCCESS : INVALID_ARGUMENT;
}

int nvmlDeviceGetMemoryInfo(void *device, u64 *memory) { // total, free, used
    const u64 driver = 600000000;
    memory[0] = strtoull(setting("PRETENDED_MEMORY", "85520809984"), NULL, 10);
    memory[1] = memory[0] - driver;
    memory[2] = driver;
    return SUCCESS;
}

int nvmlDeviceGetTotalEnergyConsumption(void *device, u64 *millijoules) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *millijoules = (u64)now.tv_sec * WATTS * 1000 + (u64)now.tv_nsec * WATTS / 1000000;
    return SUCCESS;
}

int nvmlDeviceGetP2PStatus(void *one, void *other, int kind, int *status) {
    *status = 0; // they reach each other
    return SUCCESS;
}

int nvmlDeviceGetMigMode(void *device, u32 *current, u32 *pending) {
    *current = *pending = 0;
    return SUCCESS;
}

int nvmlDeviceGetNumaNodeId(void *device, u32 *node) {
    *node = 0;
    return SUCCESS;
}

int nvmlDeviceGetPciInfo_v3(void *device, char *info) { // nvmlPciInfo_t: two bus ids and some numbers
    memset(info, 0, 68);
    snprintf(info, 16, "0000:%02x:00.0", number(device) + 1);
    snprintf(info + 36, 32, "00000000:%02x:00.0", number(device) + 1);
    return SUCCESS;
}
