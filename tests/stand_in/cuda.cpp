// A stand-in for libcudart, cuBLAS, cuDNN, cuSOLVER and NCCL on a machine without a GPU, to be preloaded
// before PyTorch's CUDA build. Part of moco_dist, under its licence.
//
// "Device" memory is zeroed host memory and copies are real. Kernels are counted by name and not
// executed, synchronisations are counted and can call back into Python. During the capture of a stream,
// whatever CUDA forbids there gives the error that CUDA gives.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>
#include <atomic>
#include <sys/mman.h>
#include <unistd.h>
#include <cxxabi.h>
#include "driver_types.h"
#include "vector_types.h"

#define API extern "C" __attribute__((visibility("default")))
typedef cudaError_t E;
static const E OK = cudaSuccess;

// ---------------------------------------------------------------- counters
struct State {
  std::mutex m;
  std::unordered_map<const void*, std::string> names;
  std::map<std::string, long> count;     // kernels and library calls, in the current phase
  std::map<uintptr_t, std::pair<size_t, int>> mem;  // start -> size, 1 device 2 pinned
};
static State& S() { static State* s = new State; return *s; }
typedef void (*Callback)(int kind, const char* what);
static Callback g_callback = nullptr;    // kind 0: launch, 1: sync, 2: library call, 3: malloc, 4: error in a capture
static int g_callback_mask = 0;
static std::atomic<long> g_launches{0}, g_syncs{0}, g_lib{0}, g_mallocs{0}, g_h2d{0}, g_d2h{0}, g_d2d{0}, g_sets{0}, g_nccl{0}, g_hostalloc{0};
static std::atomic<int> g_capturing{0};
static thread_local int t_device = 0;
static thread_local E t_last = OK;
static thread_local bool t_inside = false;

static void note(int kind, const char* what) {
  if (g_callback && (g_callback_mask >> kind & 1) && !t_inside) {
    t_inside = true;
    g_callback(kind, what);
    t_inside = false;
  }
}
static void add(const char* name) { std::lock_guard<std::mutex> l(S().m); S().count[name]++; }
static E fail(E e) { t_last = e; return e; }
static E forbidden(const char* what) {  // in a capture
  note(4, what);
  if (getenv("FAKE_LENIENT")) return OK;
  g_capturing = -1;  // invalidated
  return fail(cudaErrorStreamCaptureUnsupported);
}

// Without locks: a table of counters by the address of the host's stub.
struct Slot { std::atomic<const void*> f{nullptr}; std::atomic<long> n{0}; };
static Slot g_slots_of[65536];
static Slot& slot(const void* f) {
  size_t h = ((uintptr_t)f >> 4) * 0x9E3779B97F4A7C15ull >> 48;
  for (;; h = (h + 1) & 65535) {
    const void* there = g_slots_of[h].f.load(std::memory_order_acquire);
    if (there == f) return g_slots_of[h];
    if (!there) {
      const void* none = nullptr;
      if (g_slots_of[h].f.compare_exchange_strong(none, f) || none == f) return g_slots_of[h];
    }
  }
}
static Slot (&slots())[65536] { return g_slots_of; }
API void fake_reset() {
  for (auto& each : g_slots_of) each.n = 0;
  std::lock_guard<std::mutex> l(S().m);
  S().count.clear();
  g_launches = g_syncs = g_lib = g_mallocs = g_h2d = g_d2h = g_d2d = g_sets = g_nccl = g_hostalloc = 0;
}
API void fake_callback(Callback c, int mask) { g_callback = c; g_callback_mask = mask; }
API long fake_number(int which) {
  std::atomic<long>* all[] = {&g_launches, &g_syncs, &g_lib, &g_mallocs, &g_h2d, &g_d2h, &g_d2d, &g_sets, &g_nccl, &g_hostalloc};
  return *all[which];
}
API const char* fake_dump() {
  static std::string out;
  out.clear();
  std::lock_guard<std::mutex> l(S().m);
  std::map<std::string, long> all = S().count;
  for (auto& each : slots()) if (long n = each.n.load()) { auto it = S().names.find(each.f.load()); all["k:" + (it == S().names.end() ? std::string("?") : it->second)] += n; }
  for (auto& [k, v] : all) out += std::to_string(v) + "\t" + k + "\n";
  return out.c_str();
}

// ---------------------------------------------------------------- kernels
API void** __cudaRegisterFatBinary(void*) { static void* h[2]; return h; }
API void __cudaRegisterFatBinaryEnd(void**) {}
API void __cudaUnregisterFatBinary(void**) {}
API void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
API void __cudaRegisterFunction(void**, const char* hostFun, char*, const char* deviceName, int, uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard<std::mutex> l(S().m);
  S().names[hostFun] = deviceName;
}
struct Config { dim3 grid, block; size_t shared; void* stream; };
static thread_local std::vector<Config> t_configs;
API unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, void* st) { t_configs.push_back({g, b, s, st}); return 0; }
API E __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* st) {
  Config c = t_configs.back(); t_configs.pop_back();
  *g = c.grid; *b = c.block; *s = c.shared; *(void**)st = c.stream;
  return OK;
}
API E __cudaGetKernel(cudaKernel_t* k, const void* hostFun) { *k = (cudaKernel_t)hostFun; return OK; }
static E launch(const void* f) {
  g_launches++;
  slot(f).n.fetch_add(1, std::memory_order_relaxed);
  if (g_callback && (g_callback_mask & 1)) {
    std::string name;
    { std::lock_guard<std::mutex> l(S().m); auto it = S().names.find(f); name = it == S().names.end() ? "?" : it->second; }
    note(0, name.c_str());
  }
  return OK;
}
API E __cudaLaunchKernel(cudaKernel_t k, dim3, dim3, void**, size_t, cudaStream_t) { return launch((const void*)k); }
API E cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t) { return launch(f); }
API E cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* f, void**) { return launch(f); }
API E cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t fn, void* data) { fn(data); return OK; }
API E cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024; a->numRegs = 32; a->ptxVersion = 90; a->binaryVersion = 90;
  a->maxDynamicSharedSizeBytes = 49152;
  return OK;
}
API E cudaFuncSetAttribute(const void*, int, int) { return OK; }
API E cudaKernelSetAttributeForDevice(cudaKernel_t, int, int, int) { return OK; }
API E cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void*, int, size_t) { *n = 2; return OK; }
API E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void*, int, size_t, unsigned) { *n = 2; return OK; }
API E cudaGetSymbolAddress(void** p, const void*) { static char block[1 << 20]; *p = block; return OK; }

// ---------------------------------------------------------------- devices
static int g_false = 0;
API void fake_bool(int value) { g_false = !value; }
static bool lazy() { static bool l = getenv("FAKE_LAZY"); return l; }
static int gpus() { const char* t = getenv("FAKE_GPUS"); return t ? atoi(t) : 1; }
API E cudaGetDeviceCount(int* n) { *n = gpus(); return OK; }
API E cudaGetDevice(int* d) { *d = t_device; return OK; }
API E cudaSetDevice(int d) { t_device = d; return OK; }
API E cudaGetDeviceProperties(cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "Fake H100");
  p->uuid.bytes[0] = (char)(d + 1);
  p->totalGlobalMem = 80ul << 30; p->sharedMemPerBlock = 49152; p->regsPerBlock = 65536; p->warpSize = 32;
  p->memPitch = 2147483647; p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 65536; p->major = 9; p->minor = 0; p->textureAlignment = 512; p->multiProcessorCount = 132;
  p->canMapHostMemory = 1; p->concurrentKernels = 1; p->asyncEngineCount = 3; p->unifiedAddressing = 1;
  p->memoryBusWidth = 5120; p->l2CacheSize = 50 << 20; p->maxThreadsPerMultiProcessor = 2048;
  p->streamPrioritiesSupported = 1; p->sharedMemPerMultiprocessor = 233472; p->regsPerMultiprocessor = 65536;
  p->managedMemory = 1; p->cooperativeLaunch = 1; p->sharedMemPerBlockOptin = 232448;
  p->maxBlocksPerMultiProcessor = 32; p->reservedSharedMemPerBlock = 1024; p->memoryPoolsSupported = 1;
  p->pciBusID = d + 1; p->clusterLaunch = 1;
  return OK;
}
API E cudaDeviceGetAttribute(int* v, int a, int) {
  switch (a) {
    case 1: *v = 1024; break;                 // max threads per block
    case 16: *v = 132; break;                 // multiprocessors
    case 10: *v = 32; break;                  // warp
    case 75: *v = 9; break; case 76: *v = 0; break;
    case 8: *v = 49152; break; case 97: *v = 232448; break; case 81: *v = 233472; break;
    case 39: *v = 2048; break; case 12: *v = 65536; break; case 82: *v = 65536; break;
    case 5: *v = 2147483647; break; case 6: case 7: *v = 65535; break;
    case 2: case 3: *v = 1024; break; case 4: *v = 64; break;
    case 106: *v = 32; break; case 38: *v = 50 << 20; break;
    default: *v = 0;
  }
  return OK;
}
API E cudaDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:%02x:00.0", d + 1); return OK; }
API E cudaDeviceCanAccessPeer(int* c, int, int) { *c = 1; return OK; }
API E cudaDeviceEnablePeerAccess(int, unsigned) { return OK; }
API E cudaDeviceGetStreamPriorityRange(int* l, int* g) { *l = 0; *g = -5; return OK; }
API E cudaDriverGetVersion(int* v) { *v = 13020; return OK; }
API E cudaRuntimeGetVersion(int* v) { *v = 13020; return OK; }
API E cudaGetLastError() { E e = t_last; t_last = OK; return e; }
API E cudaPeekAtLastError() { return t_last; }
API const char* cudaGetErrorString(E e) { return e == OK ? "no error" : e == cudaErrorStreamCaptureUnsupported ? "operation not permitted when stream is capturing" : e == cudaErrorMemoryAllocation ? "out of memory" : "fake error"; }
API const char* cudaGetErrorName(E e) { return e == OK ? "cudaSuccess" : "cudaErrorFake"; }
API E cudaProfilerStart() { return OK; }
API E cudaProfilerStop() { return OK; }

// ---------------------------------------------------------------- memory
static void keep(void* p, size_t n, int kind) { std::lock_guard<std::mutex> l(S().m); S().mem[(uintptr_t)p] = {n, kind}; }
static int kind_of(const void* p) {
  std::lock_guard<std::mutex> l(S().m);
  auto it = S().mem.upper_bound((uintptr_t)p);
  if (it == S().mem.begin()) return 0;
  --it;
  return (uintptr_t)p < it->first + it->second.first ? it->second.second : 0;
}
static E allocate(void** p, size_t n, int kind) {
  *p = mmap(nullptr, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*p == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  keep(*p, n, kind);
  return OK;
}
static E release(void* p) {
  if (!p) return OK;
  std::lock_guard<std::mutex> l(S().m);
  auto it = S().mem.find((uintptr_t)p);
  if (it == S().mem.end()) return OK;
  munmap(p, it->second.first);
  S().mem.erase(it);
  return OK;
}
API E cudaMalloc(void** p, size_t n) { g_mallocs++; note(3, "cudaMalloc"); return allocate(p, n ? n : 1, 1); }
API E cudaMallocAsync(void** p, size_t n, cudaStream_t) { return cudaMalloc(p, n); }
API E cudaMallocManaged(void** p, size_t n, unsigned) { return cudaMalloc(p, n); }
API E cudaFree(void* p) { if (g_capturing > 0) return forbidden("cudaFree"); return release(p); }
API E cudaFreeAsync(void* p, cudaStream_t) { return release(p); }
API E cudaHostAlloc(void** p, size_t n, unsigned) { g_hostalloc++; note(3, "cudaHostAlloc"); if (g_capturing > 0) { E e = forbidden("cudaHostAlloc"); if (e) return e; } return allocate(p, n ? n : 1, 2); }
API E cudaMallocHost(void** p, size_t n) { return cudaHostAlloc(p, n, 0); }
API E cudaFreeHost(void* p) { return release(p); }
API E cudaHostRegister(void*, size_t, unsigned) { return OK; }
API E cudaHostUnregister(void*) { return OK; }
API E cudaMemGetInfo(size_t* f, size_t* t) { *f = 79ul << 30; *t = 80ul << 30; return OK; }
API E cudaPointerGetAttributes(cudaPointerAttributes* a, const void* p) {
  memset(a, 0, sizeof *a);
  int k = kind_of(p);
  a->type = k == 1 ? cudaMemoryTypeDevice : k == 2 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = k ? t_device : -2; a->devicePointer = k ? (void*)p : nullptr; a->hostPointer = k == 1 ? nullptr : (void*)p;
  return OK;
}
// Small pieces of device memory that were really written, by a copy or by NCCL and not by a kernel.
static std::map<uintptr_t, size_t>& written() { static auto* w = new std::map<uintptr_t, size_t>; return *w; }
static void wrote(const void* p, size_t n) { if (n <= 65536) { std::lock_guard<std::mutex> l(S().m); written()[(uintptr_t)p] = n; } }
static bool is_real(const void* p, size_t n) {
  std::lock_guard<std::mutex> l(S().m);
  auto it = written().upper_bound((uintptr_t)p);
  if (it == written().begin()) return false;
  --it;
  bool real = (uintptr_t)p + n <= it->first + it->second;
  if (real && it->second == n) written().erase(it);
  return real;
}
static void copy(void* d, const void* s, size_t n, int k) {
  int from = kind_of(s) == 1, to = kind_of(d) == 1;
  if (from && to) { g_d2d++; add("c:memcpy device to device"); }
  else if (to) { g_h2d++; add("c:memcpy host to device"); note(5, kind_of(s) == 2 ? "pinned" : "pageable"); }
  else if (from) { g_d2h++; add("c:memcpy device to host"); }
  if (from && to && lazy()) return;
  memmove(d, s, n);
  if (to && !from) wrote(d, n);
  if (from && !to && (n == 4 || n == 8) && is_real(s, n)) return;
  if (from && !to && n == 1 && !g_false) *(char*)d = 1;  // what a bool on the device says
  if (from && !to && n == 8) *(int64_t*)d = 1;  // and a number, which may be a size
  if (from && !to && n == 4) *(int32_t*)d = 0;
}
API E cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind k) {
  if (g_capturing > 0) return forbidden("cudaMemcpy");
  g_syncs++; note(1, "cudaMemcpy"); copy(d, s, n, k); return OK;
}
API E cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind k, cudaStream_t) { copy(d, s, n, k); return OK; }
API E cudaMemcpy2DAsync(void*, size_t, const void*, size_t, size_t, size_t, cudaMemcpyKind, cudaStream_t) { add("c:memcpy2d"); return OK; }
API E cudaMemcpyPeerAsync(void* d, int, const void* s, int, size_t n, cudaStream_t) { copy(d, s, n, 0); return OK; }
API E cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) { return OK; }
API E cudaMemset(void* p, int v, size_t n) { g_sets++; add("c:memset"); if (!lazy()) memset(p, v, n); return OK; }
API E cudaMemsetAsync(void* p, int v, size_t n, cudaStream_t) { g_sets++; add("c:memset"); if (!lazy()) memset(p, v, n); return OK; }
API E cudaDeviceGetDefaultMemPool(cudaMemPool_t* p, int) { *p = (cudaMemPool_t)1; return OK; }
API E cudaDeviceGetGraphMemAttribute(int, int, void* v) { *(uint64_t*)v = 0; return OK; }
API E cudaDeviceSetGraphMemAttribute(int, int, void*) { return OK; }
API E cudaMemPoolGetAttribute(cudaMemPool_t, int, void* v) { *(uint64_t*)v = 0; return OK; }
API E cudaMemPoolSetAttribute(cudaMemPool_t, int, void*) { return OK; }
API E cudaMemPoolSetAccess(cudaMemPool_t, const void*, size_t) { return OK; }
API E cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return OK; }
API E cudaIpcGetMemHandle(void*, void*) { return OK; }
API E cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) { return cudaErrorNotSupported; }
API E cudaIpcCloseMemHandle(void*) { return OK; }
API E cudaIpcGetEventHandle(void*, cudaEvent_t) { return OK; }
API E cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) { return cudaErrorNotSupported; }

// ---------------------------------------------------------------- streams, events, graphs
static std::atomic<uintptr_t> g_handle{0x1000};
static void* handle() { return (void*)(g_handle += 16); }
API E cudaStreamCreate(cudaStream_t* s) { *s = (cudaStream_t)handle(); return OK; }
API E cudaStreamCreateWithFlags(cudaStream_t* s, unsigned) { return cudaStreamCreate(s); }
API E cudaStreamCreateWithPriority(cudaStream_t* s, unsigned, int) { return cudaStreamCreate(s); }
API E cudaStreamGetPriority(cudaStream_t, int* p) { *p = 0; return OK; }
API E cudaStreamDestroy(cudaStream_t) { return OK; }
API E cudaStreamQuery(cudaStream_t) { if (g_capturing > 0) return forbidden("cudaStreamQuery"); return OK; }
static bool hung();
static E sync(const char* what) {
  if (g_capturing > 0) return forbidden(what);
  g_syncs++; note(1, what);
  while (hung()) usleep(100000);
  return OK;
}
API E cudaStreamSynchronize(cudaStream_t) { return sync("cudaStreamSynchronize"); }
API E cudaDeviceSynchronize() { return sync("cudaDeviceSynchronize"); }
API E cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { add("e:wait"); return OK; }
API E cudaStreamAddCallback(cudaStream_t s, void (*f)(cudaStream_t, E, void*), void* d, unsigned) { f(s, OK, d); return OK; }
API E cudaEventCreate(cudaEvent_t* e) { *e = (cudaEvent_t)handle(); return OK; }
API E cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return cudaEventCreate(e); }
API E cudaEventDestroy(cudaEvent_t) { return OK; }
static bool hung();
static std::map<void*, bool>& stuck() { static auto* m = new std::map<void*, bool>; return *m; }
API E cudaEventRecord(cudaEvent_t e, cudaStream_t) { add("e:record"); if (hung()) { std::lock_guard<std::mutex> l(S().m); stuck()[e] = true; } return OK; }
API E cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t st, unsigned) { return cudaEventRecord(e, st); }
API E cudaEventQuery(cudaEvent_t e) { { std::lock_guard<std::mutex> l(S().m); if (stuck().count(e)) return cudaErrorNotReady; } if (g_capturing > 0 && !getenv("FAKE_LENIENT")) return fail(cudaErrorStreamCaptureUnsupported); return OK; }
API E cudaEventSynchronize(cudaEvent_t) { return sync("cudaEventSynchronize"); }
API E cudaEventElapsedTime(float* t, cudaEvent_t, cudaEvent_t) { static float ms = getenv("FAKE_MS") ? atof(getenv("FAKE_MS")) : 20.0f; *t = ms; return OK; }
API E cudaStreamBeginCapture(cudaStream_t, int) { g_capturing = 1; return OK; }
API E cudaStreamBeginCaptureToGraph(cudaStream_t, cudaGraph_t, const void*, const void*, size_t, int) { g_capturing = 1; return OK; }
API E cudaStreamEndCapture(cudaStream_t, cudaGraph_t* g) { int was = g_capturing; g_capturing = 0; *g = (cudaGraph_t)handle(); return was > 0 ? OK : fail(cudaErrorStreamCaptureInvalidated); }
API E cudaStreamIsCapturing(cudaStream_t, int* s) { *s = g_capturing > 0 ? 1 : g_capturing < 0 ? 2 : 0; return OK; }
API E cudaStreamGetCaptureInfo(cudaStream_t, int* s, unsigned long long* id, cudaGraph_t* g, const void** d, const void** ed, size_t* n) {
  *s = g_capturing > 0 ? 1 : g_capturing < 0 ? 2 : 0;
  if (id) *id = 7;
  if (g) *g = (cudaGraph_t)0x7;
  if (d) *d = nullptr;
  if (ed) *ed = nullptr;
  if (n) *n = 0;
  return OK;
}
API E cudaStreamUpdateCaptureDependencies(cudaStream_t, void*, const void*, size_t, unsigned) { return OK; }
API E cudaThreadExchangeStreamCaptureMode(int* m) { static thread_local int now = 0; int b = now; now = *m; *m = b; return OK; }
API E cudaGraphInstantiate(void** e, cudaGraph_t, unsigned long long) { *e = handle(); return OK; }
API E cudaGraphInstantiateWithFlags(void** e, cudaGraph_t, unsigned long long) { *e = handle(); return OK; }
API E cudaGraphLaunch(void*, cudaStream_t) { g_launches++; add("k:cudaGraphLaunch"); note(0, "cudaGraphLaunch"); return OK; }
API E cudaGraphDestroy(cudaGraph_t) { return OK; }
API E cudaGraphExecDestroy(void*) { return OK; }
API E cudaGraphGetNodes(cudaGraph_t, void*, size_t* n) { *n = 1; return OK; }
API E cudaGraphRetainUserObject(cudaGraph_t, void*, unsigned, unsigned) { return OK; }
API E cudaGraphAddNode(void*, cudaGraph_t, const void*, const void*, size_t, void*) { return OK; }
API E cudaGraphConditionalHandleCreate(void*, cudaGraph_t, unsigned, unsigned) { return OK; }
API E cudaGraphNodeGetDependencies(void*, void*, void*, size_t* n) { *n = 0; return OK; }
API E cudaUserObjectCreate(void** o, void*, cudaHostFn_t, unsigned, unsigned) { *o = handle(); return OK; }
API E cudaUserObjectRelease(void*, unsigned) { return OK; }

static int driver_stub() { return 0; }
API E cudaGetDriverEntryPointByVersion(const char*, void** p, unsigned, unsigned long long, void* q) { *p = (void*)driver_stub; if (q) *(int*)q = 0; return OK; }
API E cudaLibraryLoadData(void** l, ...) { *l = handle(); return OK; }
API E cudaLibraryLoadFromFile(void** l, ...) { *l = handle(); return OK; }
API E cudaLibraryGetKernel(void** k, ...) { *k = handle(); return OK; }
API E cudaLibraryUnload(void*) { return OK; }

// ---------------------------------------------------------------- NCCL
#define LIB(name) API int name() { g_lib++; add("l:" #name); note(2, #name); return 0; }
#define QUIET(name) API int name() { return 0; }
static int nccl(const char* n) { g_nccl++; add(n); note(2, n); return 0; }
API int ncclGetVersion(int* v) { *v = 23007; return 0; }
API int ncclGetUniqueId(void* id) { memset(id, 1, 128); return 0; }
API int ncclCommGetUniqueId(void*, void* id) { memset(id, 1, 128); return 0; }
struct Comm { int n, r; };
struct Id { char x[128]; };
API int ncclCommInitRank(void** c, int n, Id, int r) { nccl("n:ncclCommInitRank"); *c = new Comm{n, r}; return 0; }
API int ncclCommInitRankConfig(void** c, int n, Id, int r, void*) { nccl("n:ncclCommInitRankConfig"); *c = new Comm{n, r}; return 0; }
API int ncclCommInitRankScalable(void** c, int n, int r, int, void*, void*) { nccl("n:ncclCommInitRankScalable"); *c = new Comm{n, r}; return 0; }
API int ncclCommSplit(void* c, int, int, void** o, void*) { *o = new Comm(*(Comm*)c); return 0; }
API int ncclCommCount(void* c, int* n) { *n = ((Comm*)c)->n; return 0; }
API int ncclCommUserRank(void* c, int* r) { *r = ((Comm*)c)->r; return 0; }
API int ncclCommGetAsyncError(void*, int* e) { *e = 0; return 0; }
API int ncclMemAlloc(void** p, size_t n) { return cudaMalloc(p, n); }
API int ncclMemFree(void* p) { cudaFree(p); return 0; }
QUIET(ncclCommFinalize) QUIET(ncclCommDestroy) QUIET(ncclCommAbort) 
QUIET(ncclCommRegister) QUIET(ncclCommDeregister) QUIET(ncclCommRevoke) QUIET(ncclCommMemStats)

// What this process sends is what the others are asked to send: a real exchange through shared memory.
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
struct Shared {
  std::atomic<int> arrived, phase;
  char op[64][96];  // what each process calls, to be compared
};
static const size_t SLOT = 256ul << 20;
static Shared* g_shared = nullptr;
static char* g_slots = nullptr;
static void open_shared(int n) {
  if (g_shared) return;
  const char* path = getenv("FAKE_NCCL");
  if (!path) { fprintf(stderr, "fake NCCL: FAKE_NCCL names no file\n"); abort(); }
  int fd = open(path, O_RDWR | O_CREAT, 0600);
  size_t total = 65536 + SLOT * n;
  if (ftruncate(fd, total)) abort();
  char* base = (char*)mmap(nullptr, total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  g_shared = (Shared*)base;
  g_slots = base + 65536;
}
// A GPU that waits for a process that is gone: from then on nothing on it ends.
static std::atomic<bool> g_hung{false};
static bool hangs() {
  static long after = getenv("FAKE_HANG_AFTER") ? atol(getenv("FAKE_HANG_AFTER")) : -1, n = 0;
  if (after >= 0 && ++n > after) g_hung = true;
  return g_hung;
}
static void barrier(int n) {
  if (g_hung) return;
  int p = g_shared->phase.load();
  if (g_shared->arrived.fetch_add(1) == n - 1) { g_shared->arrived = 0; g_shared->phase++; }
  else for (long i = 0; g_shared->phase.load() == p; i++) { usleep(50); if (i > 2400000) { fprintf(stderr, "fake NCCL: alone in a collective for 120 s\n"); _exit(99); } }
}
static size_t width(int t) { static size_t w[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1}; return w[t]; }
static void meet(Comm* c, const char* op, size_t count, int type) {
  if (hangs()) return;
  open_shared(c->n);
  snprintf(g_shared->op[c->r], 96, "%s count=%zu type=%d", op, count, type);
  if (const char* path = getenv("FAKE_NCCL_LOG")) {
    static FILE* log = fopen((std::string(path) + std::to_string(c->r)).c_str(), "w");
    fprintf(log, "%s\n", g_shared->op[c->r]); fflush(log);
  }
  note(6, g_shared->op[c->r]);
  barrier(c->n);
  for (int r = 0; r < c->n; r++)
    if (strcmp(g_shared->op[r], g_shared->op[c->r])) { fprintf(stderr, "fake NCCL: process %d calls %s and process %d %s\n", c->r, g_shared->op[c->r], r, g_shared->op[r]); _exit(98); }
  barrier(c->n);
}
static void on_device(const void* p, const char* op) {
  if (p && kind_of(p) != 1) { fprintf(stderr, "fake NCCL: %s got memory that is not on a device\n", op); _exit(97); }
}
API int ncclAllGather(const void* s, void* d, size_t count, int type, void* c_, void*) {
  Comm* c = (Comm*)c_; size_t b = count * width(type);
  nccl("n:ncclAllGather"); on_device(s, "all-gather"); on_device(d, "all-gather");
  meet(c, "allgather", count, type);
  memcpy(g_slots + SLOT * c->r, s, b); barrier(c->n);
  for (int r = 0; r < c->n; r++) memcpy((char*)d + b * r, g_slots + SLOT * r, b);
  wrote(d, b * c->n);
  barrier(c->n);
  return 0;
}
static int broadcast(const void* s, void* d, size_t count, int type, int root, Comm* c) {
  size_t b = count * width(type);
  nccl("n:ncclBroadcast"); on_device(d, "broadcast"); meet(c, "broadcast", count, type);
  if (c->r == root) memcpy(g_slots, s, b);
  barrier(c->n);
  memcpy(d, g_slots, b);
  wrote(d, b);
  barrier(c->n);
  return 0;
}
API int ncclBroadcast(const void* s, void* d, size_t n, int t, int root, void* c, void*) { return broadcast(s, d, n, t, root, (Comm*)c); }
API int ncclBcast(void* d, size_t n, int t, int root, void* c, void*) { return broadcast(d, d, n, t, root, (Comm*)c); }
API int ncclAllReduce(const void* s, void* d, size_t count, int type, int, void* c_, void*) {
  Comm* c = (Comm*)c_;
  nccl("n:ncclAllReduce"); on_device(s, "all-reduce"); meet(c, "allreduce", count, type);
  if (s != d) memcpy(d, s, count * width(type));
  return 0;
}
struct Part { Comm* c; int peer; const void* from; void* to; size_t bytes; };
static thread_local std::vector<Part> t_parts;
API int ncclSend(const void* s, size_t n, int t, int peer, void* c, void*) { nccl("n:ncclSend"); on_device(s, "send"); t_parts.push_back({(Comm*)c, peer, s, nullptr, n * width(t)}); return 0; }
API int ncclRecv(void* d, size_t n, int t, int peer, void* c, void*) { nccl("n:ncclRecv"); on_device(d, "recv"); t_parts.push_back({(Comm*)c, peer, nullptr, d, n * width(t)}); return 0; }
API int ncclGroupStart() { return 0; }
// Of each process the message to peer p lies in its slot at p / 64 of it.
API int ncclGroupEnd() {
  if (t_parts.empty()) return 0;
  Comm* c = t_parts[0].c;
  meet(c, "send and receive", 0, 0);
  for (auto& p : t_parts) if (p.from) { char* at = g_slots + SLOT * c->r + SLOT / 64 * p.peer; *(size_t*)at = p.bytes; memcpy(at + 64, p.from, p.bytes); }
  barrier(c->n);
  for (auto& p : t_parts) if (p.to) {
    char* at = g_slots + SLOT * p.peer + SLOT / 64 * c->r;
    if (*(size_t*)at != p.bytes) { fprintf(stderr, "fake NCCL: process %d receives %zu bytes of %d that sends %zu\n", c->r, p.bytes, p.peer, *(size_t*)at); _exit(96); }
    memcpy(p.to, at + 64, p.bytes);
  }
  barrier(c->n);
  t_parts.clear();
  return 0;
}
API int ncclAlltoAll(const void*, void*, size_t n, int t, void* c, void*) { nccl("n:ncclAlltoAll"); meet((Comm*)c, "alltoall", n, t); return 0; }
API int ncclRedOpCreatePreMulSum(int* op, void*, int, int, void*) { *op = 5; return 0; }
QUIET(ncclRedOpDestroy)

// ---------------------------------------------------------------- cuBLAS
API int cublasCreate_v2(void** h) { *h = handle(); return 0; }
QUIET(cublasDestroy_v2) QUIET(cublasSetStream_v2) QUIET(cublasSetWorkspace_v2) QUIET(cublasSetMathMode) QUIET(cublasSetPointerMode_v2) QUIET(cublasSetSmCountTarget)
API int cublasGetMathMode(void*, int* m) { *m = 0; return 0; }
API int cublasGetPointerMode_v2(void*, int* m) { *m = 0; return 0; }
LIB(cublasDgemm_v2) LIB(cublasDgemmStridedBatched) LIB(cublasSgemv_v2) LIB(cublasDgemv_v2) LIB(cublasSgemmEx)
LIB(cublasSdot_v2) LIB(cublasDdot_v2) LIB(cublasDotEx)
// The layout and the alignment say which kernels cuBLAS may choose.
static void gemm(const char* what, int m, int n, int k, const void* a, int lda, const void* b, int ldb, const void* c, int ldc, int at, int batch) {
  g_lib++;
  char t[200];
  snprintf(t, sizeof t, "l:%s m%d n%d k%d batch%d type%d lda%d ldb%d ldc%d aligned%d,%d,%d", what, m, n, k, batch, at, lda, ldb, ldc,
           (int)((uintptr_t)a % 16), (int)((uintptr_t)b % 16), (int)((uintptr_t)c % 16));
  add(t); note(2, t);
}
API int cublasGemmEx(void*, int, int, int m, int n, int k, const void*, const void* a, int at, int lda, const void* b, int, int ldb, const void*, void* c, int, int ldc, int, int) { gemm("cublasGemmEx", m, n, k, a, lda, b, ldb, c, ldc, at, 1); return 0; }
API int cublasGemmStridedBatchedEx(void*, int, int, int m, int n, int k, const void*, const void* a, int at, int lda, long long, const void* b, int, int ldb, long long, const void*, void* c, int, int ldc, long long, int batch, int, int) { gemm("cublasGemmStridedBatchedEx", m, n, k, a, lda, b, ldb, c, ldc, at, batch); return 0; }
API int cublasSgemm_v2(void*, int, int, int m, int n, int k, const float*, const float* a, int lda, const float* b, int ldb, const float*, float* c, int ldc) { gemm("cublasSgemm", m, n, k, a, lda, b, ldb, c, ldc, 0, 1); return 0; }
API int cublasSgemmStridedBatched(void*, int, int, int m, int n, int k, const float*, const float* a, int lda, long long, const float* b, int ldb, long long, const float*, float* c, int ldc, long long, int batch) { gemm("cublasSgemmStridedBatched", m, n, k, a, lda, b, ldb, c, ldc, 0, batch); return 0; }
API int cublasLtMatmulDescCreate(void** h, int, int) { *h = handle(); return 0; }
API int cublasLtMatrixLayoutCreate(void** h, int, uint64_t, uint64_t, int64_t) { *h = handle(); return 0; }
API int cublasLtMatmulPreferenceCreate(void** h) { *h = handle(); return 0; }
QUIET(cublasLtMatmulDescDestroy) QUIET(cublasLtMatmulDescSetAttribute) QUIET(cublasLtMatrixLayoutDestroy) QUIET(cublasLtMatrixLayoutSetAttribute) QUIET(cublasLtMatmulPreferenceDestroy) QUIET(cublasLtMatmulPreferenceSetAttribute)
API int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* r, int* n) { memset(r, 0, 64); *n = 1; return 0; }
LIB(cublasLtMatmul)

// ---------------------------------------------------------------- cuDNN, by its v7 API (TORCH_CUDNN_V8_API_DISABLED=1)
API int cudnnCreate(void** h) { *h = handle(); return 0; }
API int cudnnDestroy(void*) { return 0; }
API int cudnnSetStream(void*, void*) { return 0; }
#define CREATE(name) API int cudnnCreate##name(void** h) { *h = handle(); return 0; } API int cudnnDestroy##name(void*) { return 0; }
CREATE(TensorDescriptor) CREATE(FilterDescriptor) CREATE(ConvolutionDescriptor) CREATE(ActivationDescriptor) CREATE(PoolingDescriptor) CREATE(DropoutDescriptor)
QUIET(cudnnSetTensorNdDescriptor) QUIET(cudnnSetFilterNdDescriptor) QUIET(cudnnSetConvolutionNdDescriptor) QUIET(cudnnSetConvolutionGroupCount) QUIET(cudnnSetConvolutionMathType) QUIET(cudnnSetConvolutionReorderType)
struct Perf { int algo, status; float time; size_t memory; int determinism, math, reserved[3]; };
#define CHOOSE(name) API int name(void*, void*, void*, void*, void*, int, int* n, Perf* p) { memset(p, 0, sizeof *p); p->algo = 1; p->determinism = 1; p->math = 1; *n = 1; return 0; }
CHOOSE(cudnnGetConvolutionForwardAlgorithm_v7) CHOOSE(cudnnGetConvolutionBackwardDataAlgorithm_v7) CHOOSE(cudnnGetConvolutionBackwardFilterAlgorithm_v7)
#define SIZE(name) API int name(void*, void*, void*, void*, void*, int, size_t* n) { *n = 0; return 0; }
SIZE(cudnnGetConvolutionForwardWorkspaceSize) SIZE(cudnnGetConvolutionBackwardDataWorkspaceSize) SIZE(cudnnGetConvolutionBackwardFilterWorkspaceSize)
LIB(cudnnConvolutionForward) LIB(cudnnConvolutionBackwardData) LIB(cudnnConvolutionBackwardFilter) LIB(cudnnConvolutionBiasActivationForward)
LIB(cudnnBatchNormalizationForwardTrainingEx) LIB(cudnnBatchNormalizationBackwardEx) LIB(cudnnBatchNormalizationForwardInference)
QUIET(cudnnDeriveBNTensorDescriptor)
API int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, size_t* n) { *n = 0; return 0; }
API int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*, void*, void*, void*, size_t* n) { *n = 0; return 0; }
API int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*, size_t* n) { *n = 0; return 0; }
API void fake_launched_by_driver(const char* name) { g_launches++; std::string n = std::string("k:") + name; add(n.c_str()); note(0, name); }
// cuDNN's graph API, as far as convolutions of PyTorch go: each question has one answer, 0.
API int cudnnBackendCreateDescriptor(int, void** d) { *d = handle(); return 0; }
QUIET(cudnnBackendDestroyDescriptor) QUIET(cudnnBackendFinalize) QUIET(cudnnBackendInitialize) QUIET(cudnnBackendSetAttribute)
API int cudnnBackendGetAttribute(void*, int attribute, int type, int64_t asked, int64_t* n, void* values) {
  static const size_t bytes[] = {8, 4, 4, 4, 8, 8, 8, 4};  // by cudnnBackendAttributeType_t, the first ones
  if (n) *n = type != 11;  // an engine has no numerical notes, which would say that it rounds to TF32
  if (values && asked > 0 && type != 15) memset(values, 0, type == 3 || type == 5 || type == 6 ? 8 : 4);
  return 0;
}
LIB(cudnnBackendExecute)

// ---------------------------------------------------------------- cuSOLVER
LIB(cusolverDnCgeqrf) LIB(cusolverDnCgeqrf_bufferSize) LIB(cusolverDnCgesvd) LIB(cusolverDnCgesvd_bufferSize)
LIB(cusolverDnCgesvdaStridedBatched) LIB(cusolverDnCgesvdaStridedBatched_bufferSize) LIB(cusolverDnCgesvdj)
LIB(cusolverDnCgesvdjBatched) LIB(cusolverDnCgesvdjBatched_bufferSize) LIB(cusolverDnCgesvdj_bufferSize)
LIB(cusolverDnCgetrf) LIB(cusolverDnCgetrf_bufferSize) LIB(cusolverDnCgetrs) LIB(cusolverDnCheevd)
LIB(cusolverDnCheevd_bufferSize) LIB(cusolverDnCheevjBatched) LIB(cusolverDnCheevjBatched_bufferSize)
LIB(cusolverDnCpotrf) LIB(cusolverDnCpotrfBatched) LIB(cusolverDnCpotrf_bufferSize) LIB(cusolverDnCpotrs)
LIB(cusolverDnCpotrsBatched)
API int cusolverDnCreate(void** h) { *h = handle(); return 0; }
API int cusolverDnCreateGesvdjInfo(void** h) { *h = handle(); return 0; }
API int cusolverDnCreateParams(void** h) { *h = handle(); return 0; }
LIB(cusolverDnCsytrf) LIB(cusolverDnCsytrf_bufferSize) LIB(cusolverDnCungqr) LIB(cusolverDnCungqr_bufferSize)
LIB(cusolverDnCunmqr) LIB(cusolverDnCunmqr_bufferSize) LIB(cusolverDnDestroy) LIB(cusolverDnDestroyGesvdjInfo)
LIB(cusolverDnDestroyParams) LIB(cusolverDnDgeqrf) LIB(cusolverDnDgeqrf_bufferSize) LIB(cusolverDnDgesvd)
LIB(cusolverDnDgesvd_bufferSize) LIB(cusolverDnDgesvdaStridedBatched)
LIB(cusolverDnDgesvdaStridedBatched_bufferSize) LIB(cusolverDnDgesvdj) LIB(cusolverDnDgesvdjBatched)
LIB(cusolverDnDgesvdjBatched_bufferSize) LIB(cusolverDnDgesvdj_bufferSize) LIB(cusolverDnDgetrf)
LIB(cusolverDnDgetrf_bufferSize) LIB(cusolverDnDgetrs) LIB(cusolverDnDorgqr) LIB(cusolverDnDorgqr_bufferSize)
LIB(cusolverDnDormqr) LIB(cusolverDnDormqr_bufferSize) LIB(cusolverDnDpotrf) LIB(cusolverDnDpotrfBatched)
LIB(cusolverDnDpotrf_bufferSize) LIB(cusolverDnDpotrs) LIB(cusolverDnDpotrsBatched) LIB(cusolverDnDsyevd)
API int cusolverDnDsyevd_bufferSize(void*, int, int, int, const void*, int, const void*, int* n) { *n = 0; return 0; }
LIB(cusolverDnDsyevjBatched)
API int cusolverDnDsyevjBatched_bufferSize(void*, int, int, int, const void*, int, const void*, int* n, void*, int) { *n = 0; return 0; }
LIB(cusolverDnDsytrf) LIB(cusolverDnDsytrf_bufferSize) LIB(cusolverDnSetStream) LIB(cusolverDnSgeqrf)
LIB(cusolverDnSgeqrf_bufferSize) LIB(cusolverDnSgesvd) LIB(cusolverDnSgesvd_bufferSize)
LIB(cusolverDnSgesvdaStridedBatched) LIB(cusolverDnSgesvdaStridedBatched_bufferSize) LIB(cusolverDnSgesvdj)
LIB(cusolverDnSgesvdjBatched) LIB(cusolverDnSgesvdjBatched_bufferSize) LIB(cusolverDnSgesvdj_bufferSize)
LIB(cusolverDnSgetrf) LIB(cusolverDnSgetrf_bufferSize) LIB(cusolverDnSgetrs) LIB(cusolverDnSorgqr)
LIB(cusolverDnSorgqr_bufferSize) LIB(cusolverDnSormqr) LIB(cusolverDnSormqr_bufferSize) LIB(cusolverDnSpotrf)
LIB(cusolverDnSpotrfBatched) LIB(cusolverDnSpotrf_bufferSize) LIB(cusolverDnSpotrs)
LIB(cusolverDnSpotrsBatched) LIB(cusolverDnSsyevd)
API int cusolverDnSsyevd_bufferSize(void*, int, int, int, const void*, int, const void*, int* n) { *n = 0; return 0; }
LIB(cusolverDnSsyevjBatched)
API int cusolverDnSsyevjBatched_bufferSize(void*, int, int, int, const void*, int, const void*, int* n, void*, int) { *n = 0; return 0; }
LIB(cusolverDnSsytrf) LIB(cusolverDnSsytrf_bufferSize) LIB(cusolverDnXgeev) LIB(cusolverDnXgeev_bufferSize)
LIB(cusolverDnXgeqrf) LIB(cusolverDnXgeqrf_bufferSize) LIB(cusolverDnXgesvdjSetMaxSweeps)
LIB(cusolverDnXgesvdjSetSortEig) LIB(cusolverDnXgesvdjSetTolerance) LIB(cusolverDnXpotrf)
LIB(cusolverDnXpotrf_bufferSize) LIB(cusolverDnXpotrs) LIB(cusolverDnXsyevBatched)
API int cusolverDnXsyevBatched_bufferSize(void*, void*, int, int, int64_t, int, const void*, int64_t, int, const void*, int, size_t* a, size_t* b, int64_t) { *a = *b = 0; return 0; }
LIB(cusolverDnXsyevd)
API int cusolverDnXsyevd_bufferSize(void*, void*, int, int, int64_t, int, const void*, int64_t, int, const void*, int, size_t* a, size_t* b) { *a = *b = 0; return 0; }
LIB(cusolverDnXsytrs) LIB(cusolverDnXsytrs_bufferSize) LIB(cusolverDnZgeqrf) LIB(cusolverDnZgeqrf_bufferSize)
LIB(cusolverDnZgesvd) LIB(cusolverDnZgesvd_bufferSize) LIB(cusolverDnZgesvdaStridedBatched)
LIB(cusolverDnZgesvdaStridedBatched_bufferSize) LIB(cusolverDnZgesvdj) LIB(cusolverDnZgesvdjBatched)
LIB(cusolverDnZgesvdjBatched_bufferSize) LIB(cusolverDnZgesvdj_bufferSize) LIB(cusolverDnZgetrf)
LIB(cusolverDnZgetrf_bufferSize) LIB(cusolverDnZgetrs) LIB(cusolverDnZheevd) LIB(cusolverDnZheevd_bufferSize)
LIB(cusolverDnZheevjBatched) LIB(cusolverDnZheevjBatched_bufferSize) LIB(cusolverDnZpotrf)
LIB(cusolverDnZpotrfBatched) LIB(cusolverDnZpotrf_bufferSize) LIB(cusolverDnZpotrs)
LIB(cusolverDnZpotrsBatched) LIB(cusolverDnZsytrf) LIB(cusolverDnZsytrf_bufferSize) LIB(cusolverDnZungqr)
LIB(cusolverDnZungqr_bufferSize) LIB(cusolverDnZunmqr) LIB(cusolverDnZunmqr_bufferSize)

static bool hung() { return g_hung; }
API void fake_hang() { g_hung = true; }
