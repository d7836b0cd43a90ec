// A GPU that computes nothing. It replaces libcuda.so.1 and, by LD_PRELOAD, the functions of libcudart, libcublas, libcublasLt and libnccl
// that PyTorch's CUDA build calls. Device memory is host memory and copies are made. Kernels, matrix products and collectives are checked
// and counted, and do not run. harness.py reads the counts through the functions named nullgpu_… at the end.
//
// A copy of up to 512 bytes from the device would contain what no kernel has computed. It contains plausible values instead, chosen by its
// size: True (1 byte), 1.0 (2 bytes), falling positive numbers (4 bytes, as of a loss), 5 (8 bytes, as of a token).
//
// NULLGPU_CC=75|80|86|89|90|100|120 chooses the compute capability, NULLGPU_NAME, NULLGPU_SMS, NULLGPU_GB and NULLGPU_DEVICES the rest.

#include <cuda.h>
#include <cuda_runtime_api.h>

#define __CUDA_FP16_H__  // cublas_api.h needs these types by name only, and their headers need nvcc
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
struct __half { short bits; };
typedef __half half;
struct __nv_bfloat16 { short bits; };
struct __half2 { int bits; };
#include <cublasLt.h>
#include <cublas_v2.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <dlfcn.h>
#include <sys/mman.h>

#undef cudaStreamGetCaptureInfo  // the headers rename these to their newest versions; PyTorch links to the plain names
#undef cuModuleLoadDataEx
#undef cuDevicePrimaryCtxRelease
#define EXPORT extern "C" __attribute__((visibility("default")))

// ---- the card ---------------------------------------------------------------------------------------------------------------------------

struct Card {
    int major = 9, minor = 0, sms = 132, devices = 1;
    size_t memory = 80ull << 30, shared = 227 << 10;  // bytes of the device; of a block's shared memory
    std::string name = "NVIDIA H100 80GB HBM3";

    Card() {
        auto number = [](const char* variable, int otherwise) { return getenv(variable) ? atoi(getenv(variable)) : otherwise; };
        int capability = number("NULLGPU_CC", 90);
        major = capability / 10, minor = capability % 10;
        sms = number("NULLGPU_SMS", sms), devices = number("NULLGPU_DEVICES", devices);
        memory = (size_t)number("NULLGPU_GB", 80) << 30;
        const char* visible = getenv("CUDA_VISIBLE_DEVICES");
        if (visible && !*visible) devices = 0;  // a list of devices is ignored
        if (getenv("NULLGPU_NAME")) name = getenv("NULLGPU_NAME");
        shared = major == 9 || major == 10 ? 227 << 10 : capability == 80 ? 163 << 10 : major == 7 ? 64 << 10 : 99 << 10;
    }
};
static Card card;
static const size_t RESERVED = 500ull << 20;  // bytes of a context, which no allocation can have

// ---- what is recorded -------------------------------------------------------------------------------------------------------------------

struct Launch {
    const char* kind;  // kernel, triton, product, copy, fill, graph or collective
    std::string name;
    unsigned grid[3], block[3];
    size_t shared;
    double amount;  // bytes of a copy or fill, FLOPs of a product, nodes of a graph
    bool is_captured;  // became a node of a graph and was not launched
};
typedef void (*OnWait)(const char* function);

static std::mutex mutex;
static std::vector<Launch> launches;
static std::map<std::string, long> calls;
static std::string faults;
static OnWait on_wait = nullptr;
static std::map<char*, size_t> device_blocks, pinned_blocks;
static size_t in_use = 0;
static thread_local int current_device = 0;

// Capturing starts on one stream and spreads to those that wait for an event recorded on a capturing stream.
static std::set<void*> capturing;
static std::set<void*> captured_events;
static long nodes = 0;  // of the graph being captured
static bool capture_failed = false;

static void fault(const std::string& text) { faults += text + "\n"; }
static void count(const char* function) { std::lock_guard<std::mutex> lock(mutex); calls[function]++; }
static void refuse_in_capture(const std::string& what) {
    if (!capturing.empty()) capture_failed = true, fault(what + " while a graph is captured");
}
static void* const EVERY_STREAM = (void*)-1;

// The host waits for the device.
static void wait(const char* function, void* stream = EVERY_STREAM) {
    count(function);
    if (stream == EVERY_STREAM || capturing.count(stream)) refuse_in_capture(function);
    if (on_wait) on_wait(function);
}

static bool launch(const char* kind, const std::string& name, dim3 grid, dim3 block, size_t shared, void* stream, double amount = 0) {
    std::lock_guard<std::mutex> lock(mutex);
    bool is_captured = capturing.count(stream);
    if (is_captured) nodes++;
    else if (stream == nullptr) refuse_in_capture(name + " on the default stream");
    launches.push_back({kind, name, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared, amount, is_captured});
    size_t threads = (size_t)block.x * block.y * block.z;
    bool fits = grid.x && grid.y && grid.z && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535 && threads && threads <= 1024;
    if (fits && shared <= card.shared) return true;
    char text[256];
    snprintf(text, sizeof text, "launch of %.80s: grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory; %zu are allowed",
             name.c_str(), grid.x, grid.y, grid.z, block.x, block.y, block.z, shared, card.shared);
    fault(text);
    return false;
}
static bool simple_launch(const char* kind, const std::string& name, void* stream, double amount) {
    return launch(kind, name, dim3(1), dim3(1), 0, stream, amount);
}

// ---- runtime: devices -------------------------------------------------------------------------------------------------------------------

#define RUNTIME EXPORT cudaError_t
#define SUCCEEDS { return cudaSuccess; }

RUNTIME cudaGetDeviceCount(int* n) { *n = card.devices; return card.devices ? cudaSuccess : cudaErrorNoDevice; }
RUNTIME cudaGetDevice(int* device) { *device = current_device; return cudaSuccess; }
RUNTIME cudaSetDevice(int device) {
    if (device < 0 || device >= card.devices) return cudaErrorInvalidDevice;
    current_device = device;
    return cudaSuccess;
}
RUNTIME cudaDriverGetVersion(int* v) { *v = 13000; return cudaSuccess; }
RUNTIME cudaRuntimeGetVersion(int* v) { *v = 13000; return cudaSuccess; }
static int attribute(int a) {
    switch (a) {
        case cudaDevAttrMaxThreadsPerBlock: case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024;
        case cudaDevAttrMaxBlockDimZ: return 64;
        case cudaDevAttrMaxGridDimX: return 2147483647;
        case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
        case cudaDevAttrWarpSize: return 32;
        case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: return card.shared;
        case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return card.shared + 1024;
        case cudaDevAttrMultiProcessorCount: return card.sms;
        case cudaDevAttrComputeCapabilityMajor: return card.major;
        case cudaDevAttrComputeCapabilityMinor: return card.minor;
        case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
        case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
        case cudaDevAttrL2CacheSize: return 50 << 20;
        case cudaDevAttrClockRate: return 1755000;
        case cudaDevAttrMemoryClockRate: return 2619000;
        case cudaDevAttrGlobalMemoryBusWidth: return 5120;
        case cudaDevAttrUnifiedAddressing: return 1;
        default: return 0;
    }
}
RUNTIME cudaDeviceGetAttribute(int* v, enum cudaDeviceAttr a, int) { *v = attribute(a); return cudaSuccess; }
RUNTIME cudaGetDeviceProperties(struct cudaDeviceProp* p, int device) {
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "%s", card.name.c_str());
    memcpy(p->uuid.bytes, "nullgpu-nullgpu-", 16);
    p->major = card.major, p->minor = card.minor, p->multiProcessorCount = card.sms, p->totalGlobalMem = card.memory;
    p->sharedMemPerBlock = 48 << 10, p->sharedMemPerBlockOptin = card.shared, p->sharedMemPerMultiprocessor = card.shared + 1024;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536, p->warpSize = 32, p->maxThreadsPerBlock = 1024;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048, p->maxBlocksPerMultiProcessor = 32, p->l2CacheSize = 50 << 20;
    p->memoryBusWidth = 5120, p->textureAlignment = 512, p->pciBusID = 1 + device;
    p->unifiedAddressing = p->concurrentKernels = 1, p->asyncEngineCount = 3;
    return cudaSuccess;
}
RUNTIME cudaDeviceSynchronize() { wait("cudaDeviceSynchronize"); return cudaSuccess; }
RUNTIME cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return cudaSuccess; }
RUNTIME cudaDeviceEnablePeerAccess(int, unsigned) SUCCEEDS
RUNTIME cudaDeviceGetPCIBusId(char* s, int n, int) { snprintf(s, n, "0000:01:00.0"); return cudaSuccess; }
RUNTIME cudaDeviceGetStreamPriorityRange(int* least, int* greatest) { *least = 0, *greatest = -5; return cudaSuccess; }
RUNTIME cudaGetLastError() SUCCEEDS
RUNTIME cudaPeekAtLastError() SUCCEEDS

// ---- runtime: memory --------------------------------------------------------------------------------------------------------------------

static size_t pages(size_t n) { return n ? (n + 4095) & ~4095ull : 4096; }
static void* map_memory(size_t n) {
    return mmap(nullptr, pages(n), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
}
static bool is_inside(const std::map<char*, size_t>& blocks, const void* p) {
    auto next = blocks.upper_bound((char*)p);
    if (next == blocks.begin()) return false;
    auto block = std::prev(next);
    return (char*)p < block->first + block->second;
}
static bool is_on_device(const void* p) { std::lock_guard<std::mutex> lock(mutex); return is_inside(device_blocks, p); }
static bool is_pinned(const void* p) { std::lock_guard<std::mutex> lock(mutex); return is_inside(pinned_blocks, p); }

RUNTIME cudaMemGetInfo(size_t* free, size_t* total) { *total = card.memory, *free = card.memory - in_use - RESERVED; return cudaSuccess; }
RUNTIME cudaMalloc(void** p, size_t n) {
    std::lock_guard<std::mutex> lock(mutex);
    calls["cudaMalloc"]++;
    *p = nullptr;
    if (in_use + n > card.memory - RESERVED) return cudaErrorMemoryAllocation;
    *p = map_memory(n);
    device_blocks[(char*)*p] = n, in_use += n;
    return cudaSuccess;
}
RUNTIME cudaFree(void* p) {
    std::lock_guard<std::mutex> lock(mutex);
    calls["cudaFree"]++;
    auto block = device_blocks.find((char*)p);
    if (block == device_blocks.end()) return cudaSuccess;
    in_use -= block->second;
    munmap(p, pages(block->second));
    device_blocks.erase(block);
    return cudaSuccess;
}
RUNTIME cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
RUNTIME cudaFreeAsync(void* p, cudaStream_t) { return cudaFree(p); }
RUNTIME cudaHostAlloc(void** p, size_t n, unsigned) {
    std::lock_guard<std::mutex> lock(mutex);
    calls["cudaHostAlloc"]++;
    *p = map_memory(n), pinned_blocks[(char*)*p] = n;
    return cudaSuccess;
}
RUNTIME cudaFreeHost(void* p) {
    std::lock_guard<std::mutex> lock(mutex);
    auto block = pinned_blocks.find((char*)p);
    if (block != pinned_blocks.end()) munmap(p, pages(block->second)), pinned_blocks.erase(block);
    return cudaSuccess;
}
RUNTIME cudaHostRegister(void* p, size_t n, unsigned) {
    std::lock_guard<std::mutex> lock(mutex);
    pinned_blocks[(char*)p] = n;
    return cudaSuccess;
}
RUNTIME cudaHostUnregister(void* p) { std::lock_guard<std::mutex> lock(mutex); pinned_blocks.erase((char*)p); return cudaSuccess; }
RUNTIME cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
    memset(a, 0, sizeof *a);
    a->type = is_pinned(p) ? cudaMemoryTypeHost : is_on_device(p) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    a->devicePointer = a->hostPointer = (void*)p;
    return cudaSuccess;
}

static void invent(void* to, size_t n) {
    static std::atomic<long> n_floats{0};
    if (n == 1) *(char*)to = 1;
    else if (n == 2) *(unsigned short*)to = 0x3F80;  // 1.0 in bf16
    else if (n % 8 == 0) for (size_t i = 0; i < n / 8; i++) ((long*)to)[i] = 5;
    else if (n % 4 == 0) for (size_t i = 0; i < n / 4; i++) ((float*)to)[i] = 1 + 400.0f / (100 + n_floats++);
}
static void copy(void* to, const void* from, size_t n, void* stream) {
    bool to_device = is_on_device(to), from_device = is_on_device(from);
    const char* name = to_device && from_device ? "copy on the device" : to_device ? "copy to the device" : "copy to the host";
    if (!to_device && !from_device) name = "copy on the host";
    if (to_device != from_device && capturing.count(stream)) refuse_in_capture(name);  // a replay would find the host's memory reused
    simple_launch("copy", name, stream, n);
    if (capturing.count(stream)) return;
    if (!(to_device && from_device) || n <= 1 << 20) memmove(to, from, n);
    if (from_device && !to_device && n <= 512) invent(to, n);
}
RUNTIME cudaMemcpy(void* to, const void* from, size_t n, enum cudaMemcpyKind) {
    wait("cudaMemcpy");
    copy(to, from, n, nullptr);
    return cudaSuccess;
}
RUNTIME cudaMemcpyAsync(void* to, const void* from, size_t n, enum cudaMemcpyKind, cudaStream_t s) {
    copy(to, from, n, s);
    return cudaSuccess;
}
RUNTIME cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t n, cudaStream_t stream) {
    copy(to, from, n, stream);
    return cudaSuccess;
}
RUNTIME cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, enum cudaMemcpyKind) SUCCEEDS
RUNTIME cudaGetSymbolAddress(void** p, const void*) { static char memory[4096]; *p = memory; return cudaSuccess; }
RUNTIME cudaMemsetAsync(void* p, int value, size_t n, cudaStream_t stream) {
    simple_launch("fill", "memset", stream, n);
    if (n <= 1 << 20 && !capturing.count(stream)) memset(p, value, n);
    return cudaSuccess;
}
RUNTIME cudaMemset(void* p, int value, size_t n) { return cudaMemsetAsync(p, value, n, nullptr); }
RUNTIME cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) { *pool = (cudaMemPool_t)1; return cudaSuccess; }
RUNTIME cudaMemPoolSetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void*) SUCCEEDS
RUNTIME cudaMemPoolGetAttribute(cudaMemPool_t, enum cudaMemPoolAttr, void*) SUCCEEDS
RUNTIME cudaMemPoolTrimTo(cudaMemPool_t, size_t) SUCCEEDS

// ---- runtime: streams, events, graphs ---------------------------------------------------------------------------------------------------

static std::atomic<long> next_handle{0x1000};
template <class Handle> static cudaError_t create(Handle* handle) { *handle = (Handle)next_handle++; return cudaSuccess; }

RUNTIME cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return create(s); }
RUNTIME cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return create(s); }
RUNTIME cudaStreamCreate(cudaStream_t* s) { return create(s); }
RUNTIME cudaStreamDestroy(cudaStream_t) SUCCEEDS
RUNTIME cudaStreamQuery(cudaStream_t) SUCCEEDS
RUNTIME cudaStreamSynchronize(cudaStream_t s) { wait("cudaStreamSynchronize", s); return cudaSuccess; }
RUNTIME cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned) {
    if (captured_events.count(e)) capturing.insert(s);
    return cudaSuccess;
}
RUNTIME cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; return cudaSuccess; }
RUNTIME cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* data, unsigned) { f(s, cudaSuccess, data); return cudaSuccess; }
RUNTIME cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t f, void* data) { f(data); return cudaSuccess; }

RUNTIME cudaEventCreate(cudaEvent_t* e) { return create(e); }
RUNTIME cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return create(e); }
RUNTIME cudaEventDestroy(cudaEvent_t) SUCCEEDS
RUNTIME cudaEventRecord(cudaEvent_t e, cudaStream_t s) { if (capturing.count(s)) captured_events.insert(e); return cudaSuccess; }
RUNTIME cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
RUNTIME cudaEventQuery(cudaEvent_t) SUCCEEDS
RUNTIME cudaEventSynchronize(cudaEvent_t e) {
    wait("cudaEventSynchronize", captured_events.count(e) ? EVERY_STREAM : nullptr);
    return cudaSuccess;
}
RUNTIME cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { *ms = 1.0f; return cudaSuccess; }

// A graph is known by the number of its nodes.
static const long GRAPH = 0x100000;
RUNTIME cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode) {
    count("captures");
    capturing = {s}, captured_events.clear(), nodes = 0, capture_failed = false;
    return cudaSuccess;
}
RUNTIME cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    capturing.clear(), captured_events.clear();
    *graph = (cudaGraph_t)(GRAPH + nodes);
    return capture_failed ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
}
static cudaStreamCaptureStatus capture_status(void* s) {
    return capturing.count(s) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
}
RUNTIME cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* status) { *status = capture_status(s); return cudaSuccess; }
RUNTIME cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                 const cudaGraphNode_t** dependencies, const cudaGraphEdgeData** edges, size_t* n) {
    *status = capture_status(s);
    if (id) *id = 1;
    if (graph) *graph = (cudaGraph_t)GRAPH;
    if (dependencies) *dependencies = nullptr;
    if (edges) *edges = nullptr;
    if (n) *n = 0;
    return cudaSuccess;
}
RUNTIME cudaStreamUpdateCaptureDependencies(cudaStream_t, cudaGraphNode_t*, const cudaGraphEdgeData*, size_t, unsigned) SUCCEEDS
RUNTIME cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode*) SUCCEEDS
RUNTIME cudaGraphInstantiateWithFlags(cudaGraphExec_t* e, cudaGraph_t graph, unsigned long long) {
    *e = (cudaGraphExec_t)graph;
    return cudaSuccess;
}
RUNTIME cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s) { simple_launch("graph", "graph", s, (long)e - GRAPH); return cudaSuccess; }
RUNTIME cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* n) { *n = (long)graph - GRAPH; return cudaSuccess; }
RUNTIME cudaGraphDestroy(cudaGraph_t) SUCCEEDS
RUNTIME cudaGraphExecDestroy(cudaGraphExec_t) SUCCEEDS

// ---- runtime: kernels -------------------------------------------------------------------------------------------------------------------

static std::map<const void*, const char*> kernel_names;  // of PyTorch's kernels, by their functions on the host

EXPORT void __cudaRegisterFunction(void** handle, const char* host, char* device, const char* name, int limit, uint3* tid, uint3* bid,
                                   dim3* block, dim3* grid, int* warp) {
    typedef void (*Function)(void**, const char*, char*, const char*, int, uint3*, uint3*, dim3*, dim3*, int*);
    static auto next = (Function)dlsym(RTLD_NEXT, "__cudaRegisterFunction");
    { std::lock_guard<std::mutex> lock(mutex); kernel_names[host] = name; }
    next(handle, host, device, name, limit, tid, bid, block, grid, warp);
}
static const char* name_of(const void* f) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = kernel_names.find(f);
    return found == kernel_names.end() ? "unknown kernel" : found->second;
}
RUNTIME cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
    return launch("kernel", name_of(f), grid, block, shared, stream) ? cudaSuccess : cudaErrorInvalidConfiguration;
}
RUNTIME cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** arguments) {
    return cudaLaunchKernel(f, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
RUNTIME __cudaGetKernel(cudaKernel_t* kernel, const void* f) { *kernel = (cudaKernel_t)f; return cudaSuccess; }
RUNTIME __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
    return cudaLaunchKernel((const void*)kernel, grid, block, arguments, shared, stream);
}
RUNTIME cudaFuncSetAttribute(const void*, enum cudaFuncAttribute, int) SUCCEEDS
RUNTIME cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void*) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024, a->numRegs = 32, a->maxDynamicSharedSizeBytes = 48 << 10;
    a->binaryVersion = a->ptxVersion = card.major * 10 + card.minor;
    return cudaSuccess;
}
RUNTIME cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; return cudaSuccess; }
RUNTIME cudaGetDriverEntryPointByVersion(const char* name, void** p, unsigned, unsigned long long,
    enum cudaDriverEntryPointQueryResult* result) {
    static void* self = dlopen("libcuda.so.1", RTLD_LAZY);
    static char unused[16];  // for functions that are looked up and not called
    *p = dlsym(self, name);
    if (!*p) *p = unused;
    if (result) *result = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ---- driver -----------------------------------------------------------------------------------------------------------------------------

#define DRIVER EXPORT CUresult
#undef SUCCEEDS
#define SUCCEEDS { return CUDA_SUCCESS; }
struct Function { std::string name; };

DRIVER cuInit(unsigned) { return card.devices ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
DRIVER cuDriverGetVersion(int* v) { *v = 13000; return CUDA_SUCCESS; }
DRIVER cuDeviceGetCount(int* n) { *n = card.devices; return CUDA_SUCCESS; }
DRIVER cuDeviceGet(CUdevice* d, int i) { *d = i; return CUDA_SUCCESS; }
DRIVER cuDeviceGetName(char* s, int n, CUdevice) { snprintf(s, n, "%s", card.name.c_str()); return CUDA_SUCCESS; }
DRIVER cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice) { *v = attribute(a); return CUDA_SUCCESS; }
DRIVER cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* is_active) { *flags = 0, *is_active = 1; return CUDA_SUCCESS; }
DRIVER cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice) { *c = (CUcontext)1; return CUDA_SUCCESS; }
DRIVER cuCtxGetCurrent(CUcontext* c) { *c = (CUcontext)1; return CUDA_SUCCESS; }
DRIVER cuCtxSetCurrent(CUcontext) SUCCEEDS
DRIVER cuCtxGetDevice(CUdevice* d) { *d = current_device; return CUDA_SUCCESS; }
DRIVER cuCtxGetLimit(size_t* v, CUlimit) { *v = 1 << 20; return CUDA_SUCCESS; }
DRIVER cuCtxSetLimit(CUlimit, size_t) SUCCEEDS
DRIVER cuGetErrorString(CUresult, const char** s) { *s = "refused by the null GPU"; return CUDA_SUCCESS; }
DRIVER cuGetErrorName(CUresult, const char** s) { *s = "refused by the null GPU"; return CUDA_SUCCESS; }
DRIVER cuModuleLoad(CUmodule* m, const char*) { *m = (CUmodule)2; return CUDA_SUCCESS; }
DRIVER cuModuleLoadData(CUmodule* m, const void*) { *m = (CUmodule)2; return CUDA_SUCCESS; }
DRIVER cuModuleLoadDataEx(CUmodule* m, const void*, unsigned, CUjit_option*, void**) { *m = (CUmodule)2; return CUDA_SUCCESS; }
DRIVER cuModuleUnload(CUmodule) SUCCEEDS
DRIVER cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) { *f = (CUfunction) new Function{name}; return CUDA_SUCCESS; }
DRIVER cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction) {
    *v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0;
    return CUDA_SUCCESS;
}
DRIVER cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
    if (a != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || (size_t)v <= card.shared) return CUDA_SUCCESS;
    fault(((Function*)f)->name + ": " + std::to_string(v) + " bytes of shared memory; " + std::to_string(card.shared) + " are allowed");
    return CUDA_ERROR_INVALID_VALUE;
}
DRIVER cuFuncSetCacheConfig(CUfunction, CUfunc_cache) SUCCEEDS
DRIVER cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, CUfunction, int, size_t) { *n = 2; return CUDA_SUCCESS; }
DRIVER cuOccupancyMaxActiveClusters(int* n, CUfunction, const CUlaunchConfig*) { *n = 2; return CUDA_SUCCESS; }
DRIVER cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
    const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
    CUtensorMapFloatOOBfill) SUCCEEDS
DRIVER cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
    if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) {
        if (!is_on_device((void*)p)) return CUDA_ERROR_INVALID_VALUE;  // how Triton refuses a CPU tensor
        *(CUdeviceptr*)v = p;
    } else if (a == CU_POINTER_ATTRIBUTE_CONTEXT) *(CUcontext*)v = (CUcontext)1;
    else *(unsigned*)v = 0;
    return CUDA_SUCCESS;
}
DRIVER cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
    CUstream stream, void**, void**) {
    bool ok = launch("triton", ((Function*)f)->name, dim3(gx, gy, gz), dim3(bx, by, bz), shared, stream);
    return ok ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
DRIVER cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** arguments, void** extra) {
    return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ, c->sharedMemBytes, c->hStream,
                          arguments, extra);
}
DRIVER cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
    unsigned shared, CUstream stream, void** arguments) {
    return cuLaunchKernel(f, gx, gy, gz, bx, by, bz, shared, stream, arguments, nullptr);
}

// ---- cuBLAS: matrix products ------------------------------------------------------------------------------------------------------------

#define BLAS EXPORT cublasStatus_t
#undef SUCCEEDS
#define SUCCEEDS { return CUBLAS_STATUS_SUCCESS; }
static thread_local void* blas_stream = nullptr;  // PyTorch sets it before every call
static thread_local cublasMath_t math_mode = CUBLAS_DEFAULT_MATH;

static const char* type_name(int type) {
    return type == CUDA_R_32F ? "fp32" : type == CUDA_R_16BF ? "bf16" : type == CUDA_R_16F ? "fp16" : type == CUDA_R_64F ? "fp64" : "?";
}
static cublasStatus_t product(long m, long n, long k, int operands, int result, long batch = 1, const char* note = "") {
    char name[160];
    snprintf(name, sizeof name, "%ld of %ld x %ld x %ld, %s to %s%s", batch, m, n, k, type_name(operands), type_name(result), note);
    simple_launch("product", name, blas_stream, 2.0 * m * n * k * batch);
    return CUBLAS_STATUS_SUCCESS;
}
static const char* tf32() { return math_mode == CUBLAS_TF32_TENSOR_OP_MATH ? ", TF32" : ""; }
typedef cublasHandle_t H;
typedef cublasOperation_t Op;

BLAS cublasCreate_v2(H* h) { *h = (H)5; return CUBLAS_STATUS_SUCCESS; }
BLAS cublasDestroy_v2(H) SUCCEEDS
BLAS cublasSetStream_v2(H, cudaStream_t s) { blas_stream = s; return CUBLAS_STATUS_SUCCESS; }
BLAS cublasSetWorkspace_v2(H, void*, size_t) SUCCEEDS
BLAS cublasSetMathMode(H, cublasMath_t m) { math_mode = m; return CUBLAS_STATUS_SUCCESS; }
BLAS cublasGetMathMode(H, cublasMath_t* m) { *m = math_mode; return CUBLAS_STATUS_SUCCESS; }
BLAS cublasSetPointerMode_v2(H, cublasPointerMode_t) SUCCEEDS
BLAS cublasGetPointerMode_v2(H, cublasPointerMode_t* m) { *m = CUBLAS_POINTER_MODE_HOST; return CUBLAS_STATUS_SUCCESS; }
BLAS cublasSetSmCountTarget(H, int) SUCCEEDS
BLAS cublasGemmEx(H, Op, Op, int m, int n, int k, const void*, const void*, cudaDataType a, int, const void*, cudaDataType, int,
    const void*, void*, cudaDataType c, int, cublasComputeType_t, cublasGemmAlgo_t) { return product(m, n, k, a, c); }
BLAS cublasSgemm_v2(H, Op, Op, int m, int n, int k, const float*, const float*, int, const float*, int, const float*, float*, int) {
    return product(m, n, k, CUDA_R_32F, CUDA_R_32F, 1, tf32());
}
BLAS cublasDgemm_v2(H, Op, Op, int m, int n, int k, const double*, const double*, int, const double*, int, const double*, double*, int) {
    return product(m, n, k, CUDA_R_64F, CUDA_R_64F);
}
BLAS cublasGemmStridedBatchedEx(H, Op, Op, int m, int n, int k, const void*, const void*, cudaDataType a, int, long long, const void*,
    cudaDataType, int, long long, const void*, void*, cudaDataType c, int, long long, int batch, cublasComputeType_t, cublasGemmAlgo_t) {
    return product(m, n, k, a, c, batch);
}
BLAS cublasSgemmStridedBatched(H, Op, Op, int m, int n, int k, const float*, const float*, int, long long, const float*, int, long long,
    const float*, float*, int, long long, int batch) { return product(m, n, k, CUDA_R_32F, CUDA_R_32F, batch, tf32()); }
BLAS cublasSgemv_v2(H, Op, int m, int n, const float*, const float*, int, const float*, int, const float*, float*, int) {
    return product(m, n, 1, CUDA_R_32F, CUDA_R_32F);
}
BLAS cublasDgemmStridedBatched(H, Op, Op, int m, int n, int k, const double*, const double*, int, long long, const double*, int, long long,
    const double*, double*, int, long long, int batch) { return product(m, n, k, CUDA_R_64F, CUDA_R_64F, batch); }
BLAS cublasDgemv_v2(H, Op, int m, int n, const double*, const double*, int, const double*, int, const double*, double*, int) {
    return product(m, n, 1, CUDA_R_64F, CUDA_R_64F);
}
BLAS cublasSdot_v2(H, int n, const float*, int, const float*, int, float*) { return product(1, 1, n, CUDA_R_32F, CUDA_R_32F); }
BLAS cublasDdot_v2(H, int n, const double*, int, const double*, int, double*) { return product(1, 1, n, CUDA_R_64F, CUDA_R_64F); }
BLAS cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*, cublasLtMatrixLayout_t, const void*,
    cublasLtMatrixLayout_t, const void*, const void*, cublasLtMatrixLayout_t, void*, cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t*,
    void*, size_t, cudaStream_t stream) {
    simple_launch("product", "cublasLtMatmul", stream, 0);
    return CUBLAS_STATUS_SUCCESS;
}
BLAS cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
    cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t results[], int* n) {
    memset(results, 0, sizeof *results);
    results->state = CUBLAS_STATUS_SUCCESS, *n = 1;
    return CUBLAS_STATUS_SUCCESS;
}

// ---- NCCL: every collective succeeds and moves nothing ----------------------------------------------------------------------------------

#define NCCL EXPORT int
#undef SUCCEEDS
#define SUCCEEDS { return 0; }
struct NcclId { char bytes[128]; };

static int join(void** communicator) { *communicator = malloc(256); return 0; }
static int collective(const char* name, size_t n, void* stream) { simple_launch("collective", name, stream, n); return 0; }
NCCL ncclGetUniqueId(NcclId* id) { memset(id, 7, sizeof *id); return 0; }
NCCL ncclCommInitRank(void** c, int, NcclId, int) { return join(c); }
NCCL ncclCommInitRankConfig(void** c, int, NcclId, int, void*) { return join(c); }
NCCL ncclCommInitRankScalable(void** c, int, int, int, NcclId*, void*) { return join(c); }
NCCL ncclCommGetAsyncError(void*, int* error) { *error = 0; return 0; }
NCCL ncclAllReduce(const void*, void*, size_t n, int, int, void*, cudaStream_t s) { return collective("all-reduce", n, s); }
NCCL ncclBroadcast(const void*, void*, size_t n, int, int, void*, cudaStream_t s) { return collective("broadcast", n, s); }
NCCL ncclBcast(void*, size_t n, int, int, void*, cudaStream_t s) { return collective("broadcast", n, s); }
NCCL ncclAllGather(const void*, void*, size_t n, int, void*, cudaStream_t s) { return collective("all-gather", n, s); }
NCCL ncclGroupStart() SUCCEEDS
NCCL ncclGroupEnd() SUCCEEDS
NCCL ncclCommDestroy(void*) SUCCEEDS
NCCL ncclCommAbort(void*) SUCCEEDS
NCCL ncclCommFinalize(void*) SUCCEEDS
NCCL ncclCommRegister(void*, void*, size_t, void**) SUCCEEDS
NCCL ncclCommDeregister(void*, void*) SUCCEEDS
NCCL ncclCommCount(void*, int* n) { *n = card.devices; return 0; }

// ---- for harness.py ---------------------------------------------------------------------------------------------------------------------

EXPORT void nullgpu_reset() { std::lock_guard<std::mutex> lock(mutex); launches.clear(), calls.clear(), faults.clear(); }
EXPORT long nullgpu_launches() { return launches.size(); }
EXPORT const char* nullgpu_launch(long i, const char** name, unsigned* numbers, double* amount) {
    const Launch& l = launches[i];
    for (int k = 0; k < 3; k++) numbers[k] = l.grid[k], numbers[3 + k] = l.block[k];
    numbers[6] = l.shared, numbers[7] = l.is_captured;
    *name = l.name.c_str(), *amount = l.amount;
    return l.kind;
}
EXPORT long nullgpu_calls(const char* function) {
    std::lock_guard<std::mutex> lock(mutex);
    return calls.count(function) ? calls[function] : 0;
}
EXPORT const char* nullgpu_faults() { return faults.c_str(); }
EXPORT void nullgpu_on_wait(OnWait f) { on_wait = f; }
