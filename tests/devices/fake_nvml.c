// A libnvidia-ml.so.1 for tests, for the unmodified binding. What it plays is in the environment:
// FAKE_GPUS (how many), FAKE_LOST (index of a GPU that fell off the bus), FAKE_INIT (error code of the start).
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, LOST = 15 };
typedef struct { int index; } Gpu;
static Gpu gpus[16];
static int started = 0;

static int setting(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int check(const Gpu* gpu) {
    if (!started) return UNINITIALIZED;
    return gpu->index == setting("FAKE_LOST", -1) ? LOST : OK;
}

#define ANSWER(gpu, statement)      \
    const int state = check(gpu);   \
    if (state == OK) { statement; } \
    return state

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    for (int i = 0; i < 16; ++i) gpus[i].index = i;
    const int state = setting("FAKE_INIT", OK);
    started = state == OK;
    return state;
}
int nvmlShutdown(void) { started = 0; return OK; }
const char* nvmlErrorString(int code) { (void)code; return "fake error"; }
int nvmlSystemGetDriverVersion(char* text, unsigned size) { snprintf(text, size, "580.95.05"); return OK; }
int nvmlDeviceGetCount_v2(unsigned* count) { *count = setting("FAKE_GPUS", 1); return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, Gpu** gpu) { *gpu = &gpus[i]; return OK; }
int nvmlDeviceGetName(Gpu* gpu, char* text, unsigned size) { ANSWER(gpu, snprintf(text, size, "NVIDIA H200")); }
int nvmlDeviceGetUUID(Gpu* gpu, char* text, unsigned size) {
    ANSWER(gpu, snprintf(text, size, "GPU-00000000-0000-0000-0000-%012x", gpu->index));
}

typedef struct { unsigned long long total, free, used; } Memory;
int nvmlDeviceGetMemoryInfo(Gpu* gpu, Memory* memory) {
    ANSWER(gpu, memory->total = 141ull << 30; memory->used = 1ull << 30; memory->free = 140ull << 30);
}

typedef struct { char legacy[16]; unsigned domain, bus, device, id, subsystem; char bus_id[32]; } Pci;
int nvmlDeviceGetPciInfo_v3(Gpu* gpu, Pci* pci) {
    ANSWER(gpu, memset(pci, 0, sizeof *pci); snprintf(pci->bus_id, 32, "00000000:%02X:00.0", 16 + gpu->index));
}

int nvmlDeviceGetMaxPcieLinkGeneration(Gpu* gpu, unsigned* value) { ANSWER(gpu, *value = 5); }
int nvmlDeviceGetMaxPcieLinkWidth(Gpu* gpu, unsigned* value) { ANSWER(gpu, *value = 16); }
int nvmlDeviceGetMemoryBusWidth(Gpu* gpu, unsigned* value) { ANSWER(gpu, *value = 6144); }
int nvmlDeviceGetMaxClockInfo(Gpu* gpu, int which, unsigned* value) { ANSWER(gpu, (void)which; *value = 3201); }
int nvmlDeviceGetNumaNodeId(Gpu* gpu, unsigned* value) { ANSWER(gpu, *value = gpu->index / 4); }
int nvmlDeviceGetCudaComputeCapability(Gpu* gpu, int* major, int* minor) { ANSWER(gpu, *major = 9; *minor = 0); }
int nvmlDeviceGetMigMode(Gpu* gpu, unsigned* now, unsigned* next) { (void)gpu, (void)now, (void)next; return NOT_SUPPORTED; }
int nvmlDeviceGetNvLinkState(Gpu* gpu, unsigned link, unsigned* up) {
    if (link >= 18) return INVALID;
    ANSWER(gpu, *up = 1);
}
int nvmlDeviceGetNvLinkRemoteDeviceType(Gpu* gpu, unsigned link, int* kind) { ANSWER(gpu, (void)link; *kind = 2); }
// nvmlDeviceGetNvLinkRemotePciInfo_v2 is absent, as in an old driver.
