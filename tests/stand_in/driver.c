// A stand-in for the driver, libcuda.so.1, next to cuda.cpp: what PyTorch and Triton ask it for. Part of
// moco_dist, under its licence.
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <dlfcn.h>
#include <stdlib.h>
static uintptr_t next = 0x5000;
static char names[4096][160]; static int used;
void (*fake_launched)(const char*);
static void count(const char* n) { if (!fake_launched) fake_launched = dlsym(RTLD_DEFAULT, "fake_launched_by_driver"); if (fake_launched) fake_launched(n); }
int cuDevicePrimaryCtxGetState(int d, unsigned* f, int* a) { if (f) *f = 0; if (a) *a = 1; return 0; }
int cuGetProcAddress(const char* s, void** p, int v, uint64_t f) { *p = dlsym(RTLD_DEFAULT, s); return *p ? 0 : 500; }
int cuGetProcAddress_v2(const char* s, void** p, int v, uint64_t f, int* q) { *p = dlsym(RTLD_DEFAULT, s); if (q) *q = *p ? 0 : 1; return *p ? 0 : 500; }
int cuDeviceGetCount(int* n) { const char* t = getenv("FAKE_GPUS"); *n = t ? atoi(t) : 1; return 0; }
int cuDriverGetVersion(int* v) { *v = 13020; return 0; }
int cuDeviceGet(int* d, int i) { *d = i; return 0; }
int cuCtxGetCurrent(void** c) { *c = (void*)0x77; return 0; }
int cuCtxGetDevice(int* d) { *d = 0; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)0x77; return 0; }
int cudaDeviceGetAttribute(int* v, int a, int d);
int cuDeviceGetAttribute(int* v, int a, int d) { int (*f)(int*, int, int) = dlsym(RTLD_DEFAULT, "cudaDeviceGetAttribute"); return f ? f(v, a, d) : (*v = 0, 0); }
int cuDeviceGetName(char* s, int n, int d) { snprintf(s, n, "Fake H100"); return 0; }
int cuDeviceTotalMem_v2(size_t* n, int d) { *n = 80ul << 30; return 0; }
int cuDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:01:00.0"); return 0; }
int cuModuleLoadData(void** m, const void* x) { *m = (void*)(next += 16); return 0; }
int cuModuleLoad(void** m, const char* x) { *m = (void*)(next += 16); return 0; }
int cuModuleLoadDataEx(void** m, const void* x, unsigned n, void* o, void* v) { *m = (void*)(next += 16); return 0; }
int cuModuleGetFunction(void** f, void* m, const char* n) { if (used < 4096) { snprintf(names[used], 160, "%s", n); *f = names[used++]; } else *f = names[0]; return 0; }
int cuLibraryLoadData(void** m, ...) { *m = (void*)(next += 16); return 0; }
int cuLibraryGetKernel(void** f, void* m, const char* n) { return cuModuleGetFunction(f, m, n); }
int cuKernelGetFunction(void** f, void* k) { *f = k; return 0; }
int cuFuncGetAttribute(int* v, int a, void* f) { *v = a == 4 ? 32 : a == 0 ? 1024 : 0; return 0; }
static const char* name_of(void* f) { return (char*)f >= names[0] && (char*)f < names[4095] ? (const char*)f : "driver kernel"; }
int cuLaunchKernel(void* f, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned g, unsigned h, void* s, void** p, void** x) { count(name_of(f)); return 0; }
int cuLaunchKernelEx(const void* config, void* f, void** p, void** x) { count(name_of(f)); return 0; }
int cuGetErrorString(int e, const char** s) { *s = "fake"; return 0; }
int cuPointerGetAttribute(void* d, int a, uint64_t p) { *(uint64_t*)d = p; return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, ...) { *n = 2; return 0; }
int cuOccupancyMaxActiveClusters(int* n, ...) { *n = 2; return 0; }

// Never asked, or the answer does not matter.
#define ZERO(name) int name() { return 0; }
ZERO(cuArray3DCreate) ZERO(cuArray3DCreate_v2) ZERO(cuArray3DGetDescriptor) ZERO(cuArray3DGetDescriptor_v2)
ZERO(cuArrayCreate) ZERO(cuArrayCreate_v2) ZERO(cuArrayDestroy) ZERO(cuArrayGetDescriptor)
ZERO(cuArrayGetDescriptor_v2) ZERO(cuArrayGetMemoryRequirements) ZERO(cuArrayGetPlane)
ZERO(cuArrayGetSparseProperties) ZERO(cuCheckpointProcessCheckpoint)
ZERO(cuCheckpointProcessGetRestoreThreadId) ZERO(cuCheckpointProcessGetState) ZERO(cuCheckpointProcessLock)
ZERO(cuCheckpointProcessRestore) ZERO(cuCheckpointProcessUnlock) ZERO(cuCoredumpDeregisterCompleteCallback)
ZERO(cuCoredumpDeregisterStartCallback) ZERO(cuCoredumpGetAttribute) ZERO(cuCoredumpGetAttributeGlobal)
ZERO(cuCoredumpRegisterCompleteCallback) ZERO(cuCoredumpRegisterStartCallback) ZERO(cuCoredumpSetAttribute)
ZERO(cuCoredumpSetAttributeGlobal) ZERO(cuCtxAttach) ZERO(cuCtxCreate) ZERO(cuCtxCreate_v2)
ZERO(cuCtxCreate_v3) ZERO(cuCtxCreate_v4) ZERO(cuCtxDestroy) ZERO(cuCtxDestroy_v2) ZERO(cuCtxDetach)
ZERO(cuCtxDisablePeerAccess) ZERO(cuCtxEnablePeerAccess) ZERO(cuCtxFromGreenCtx) ZERO(cuCtxGetApiVersion)
ZERO(cuCtxGetCacheConfig) ZERO(cuCtxGetDevResource) ZERO(cuCtxGetDevice_v2) ZERO(cuCtxGetExecAffinity)
ZERO(cuCtxGetFlags) ZERO(cuCtxGetId) ZERO(cuCtxGetLimit) ZERO(cuCtxGetSharedMemConfig)
ZERO(cuCtxGetStreamPriorityRange) ZERO(cuCtxPopCurrent) ZERO(cuCtxPopCurrent_v2) ZERO(cuCtxPushCurrent)
ZERO(cuCtxPushCurrent_v2) ZERO(cuCtxRecordEvent) ZERO(cuCtxResetPersistingL2Cache) ZERO(cuCtxSetCacheConfig)
ZERO(cuCtxSetCurrent) ZERO(cuCtxSetFlags) ZERO(cuCtxSetLimit) ZERO(cuCtxSetSharedMemConfig)
ZERO(cuCtxSynchronize) ZERO(cuCtxSynchronize_v2) ZERO(cuCtxWaitEvent) ZERO(cuDestroyExternalMemory)
ZERO(cuDestroyExternalSemaphore) ZERO(cuDevResourceGenerateDesc) ZERO(cuDevSmResourceSplit)
ZERO(cuDevSmResourceSplitByCount) ZERO(cuDeviceCanAccessPeer) ZERO(cuDeviceComputeCapability)
ZERO(cuDeviceGetByPCIBusId) ZERO(cuDeviceGetDefaultMemPool) ZERO(cuDeviceGetDevResource)
ZERO(cuDeviceGetExecAffinitySupport) ZERO(cuDeviceGetGraphMemAttribute)
ZERO(cuDeviceGetHostAtomicCapabilities) ZERO(cuDeviceGetLuid) ZERO(cuDeviceGetMemPool)
ZERO(cuDeviceGetNvSciSyncAttributes) ZERO(cuDeviceGetP2PAtomicCapabilities) ZERO(cuDeviceGetP2PAttribute)
ZERO(cuDeviceGetProperties) ZERO(cuDeviceGetTexture1DLinearMaxWidth) ZERO(cuDeviceGetUuid)
ZERO(cuDeviceGetUuid_v2) ZERO(cuDeviceGraphMemTrim) ZERO(cuDevicePrimaryCtxRelease)
ZERO(cuDevicePrimaryCtxRelease_v2) ZERO(cuDevicePrimaryCtxReset) ZERO(cuDevicePrimaryCtxReset_v2)
ZERO(cuDevicePrimaryCtxSetFlags) ZERO(cuDevicePrimaryCtxSetFlags_v2) ZERO(cuDeviceRegisterAsyncNotification)
ZERO(cuDeviceSetGraphMemAttribute) ZERO(cuDeviceSetMemPool) ZERO(cuDeviceTotalMem)
ZERO(cuDeviceUnregisterAsyncNotification) ZERO(cuEventCreate) ZERO(cuEventDestroy) ZERO(cuEventDestroy_v2)
ZERO(cuEventElapsedTime) ZERO(cuEventElapsedTime_v2) ZERO(cuEventQuery) ZERO(cuEventRecord)
ZERO(cuEventRecordWithFlags) ZERO(cuEventSynchronize) ZERO(cuExternalMemoryGetMappedBuffer)
ZERO(cuExternalMemoryGetMappedMipmappedArray) ZERO(cuFlushGPUDirectRDMAWrites) ZERO(cuFuncGetModule)
ZERO(cuFuncGetName) ZERO(cuFuncGetParamCount) ZERO(cuFuncGetParamInfo) ZERO(cuFuncIsLoaded) ZERO(cuFuncLoad)
ZERO(cuFuncSetAttribute) ZERO(cuFuncSetBlockShape) ZERO(cuFuncSetCacheConfig) ZERO(cuFuncSetSharedMemConfig)
ZERO(cuFuncSetSharedSize) ZERO(cuGetErrorName) ZERO(cuGetExportTable) ZERO(cuGetProcAddress_v2_ptsz)
ZERO(cuGraphAddBatchMemOpNode) ZERO(cuGraphAddChildGraphNode) ZERO(cuGraphAddDependencies)
ZERO(cuGraphAddDependencies_v2) ZERO(cuGraphAddEmptyNode) ZERO(cuGraphAddEventRecordNode)
ZERO(cuGraphAddEventWaitNode) ZERO(cuGraphAddExternalSemaphoresSignalNode)
ZERO(cuGraphAddExternalSemaphoresWaitNode) ZERO(cuGraphAddHostNode) ZERO(cuGraphAddKernelNode)
ZERO(cuGraphAddKernelNode_v2) ZERO(cuGraphAddMemAllocNode) ZERO(cuGraphAddMemFreeNode)
ZERO(cuGraphAddMemcpyNode) ZERO(cuGraphAddMemsetNode) ZERO(cuGraphAddNode) ZERO(cuGraphAddNode_v2)
ZERO(cuGraphBatchMemOpNodeGetParams) ZERO(cuGraphBatchMemOpNodeSetParams) ZERO(cuGraphChildGraphNodeGetGraph)
ZERO(cuGraphClone) ZERO(cuGraphConditionalHandleCreate) ZERO(cuGraphCreate) ZERO(cuGraphDebugDotPrint)
ZERO(cuGraphDestroy) ZERO(cuGraphDestroyNode) ZERO(cuGraphEventRecordNodeGetEvent)
ZERO(cuGraphEventRecordNodeSetEvent) ZERO(cuGraphEventWaitNodeGetEvent) ZERO(cuGraphEventWaitNodeSetEvent)
ZERO(cuGraphExecBatchMemOpNodeSetParams) ZERO(cuGraphExecChildGraphNodeSetParams) ZERO(cuGraphExecDestroy)
ZERO(cuGraphExecEventRecordNodeSetEvent) ZERO(cuGraphExecEventWaitNodeSetEvent)
ZERO(cuGraphExecExternalSemaphoresSignalNodeSetParams) ZERO(cuGraphExecExternalSemaphoresWaitNodeSetParams)
ZERO(cuGraphExecGetFlags) ZERO(cuGraphExecGetId) ZERO(cuGraphExecHostNodeSetParams)
ZERO(cuGraphExecKernelNodeSetParams) ZERO(cuGraphExecKernelNodeSetParams_v2)
ZERO(cuGraphExecMemcpyNodeSetParams) ZERO(cuGraphExecMemsetNodeSetParams) ZERO(cuGraphExecNodeSetParams)
ZERO(cuGraphExecUpdate) ZERO(cuGraphExecUpdate_v2) ZERO(cuGraphExternalSemaphoresSignalNodeGetParams)
ZERO(cuGraphExternalSemaphoresSignalNodeSetParams) ZERO(cuGraphExternalSemaphoresWaitNodeGetParams)
ZERO(cuGraphExternalSemaphoresWaitNodeSetParams) ZERO(cuGraphGetEdges) ZERO(cuGraphGetEdges_v2)
ZERO(cuGraphGetId) ZERO(cuGraphGetNodes) ZERO(cuGraphGetRootNodes) ZERO(cuGraphHostNodeGetParams)
ZERO(cuGraphHostNodeSetParams) ZERO(cuGraphInstantiate) ZERO(cuGraphInstantiateWithFlags)
ZERO(cuGraphInstantiateWithParams) ZERO(cuGraphInstantiate_v2) ZERO(cuGraphKernelNodeCopyAttributes)
ZERO(cuGraphKernelNodeGetAttribute) ZERO(cuGraphKernelNodeGetParams) ZERO(cuGraphKernelNodeGetParams_v2)
ZERO(cuGraphKernelNodeSetAttribute) ZERO(cuGraphKernelNodeSetParams) ZERO(cuGraphKernelNodeSetParams_v2)
ZERO(cuGraphLaunch) ZERO(cuGraphMemAllocNodeGetParams) ZERO(cuGraphMemFreeNodeGetParams)
ZERO(cuGraphMemcpyNodeGetParams) ZERO(cuGraphMemcpyNodeSetParams) ZERO(cuGraphMemsetNodeGetParams)
ZERO(cuGraphMemsetNodeSetParams) ZERO(cuGraphNodeFindInClone) ZERO(cuGraphNodeGetContainingGraph)
ZERO(cuGraphNodeGetDependencies) ZERO(cuGraphNodeGetDependencies_v2) ZERO(cuGraphNodeGetDependentNodes)
ZERO(cuGraphNodeGetDependentNodes_v2) ZERO(cuGraphNodeGetEnabled) ZERO(cuGraphNodeGetLocalId)
ZERO(cuGraphNodeGetParams) ZERO(cuGraphNodeGetToolsId) ZERO(cuGraphNodeGetType) ZERO(cuGraphNodeSetEnabled)
ZERO(cuGraphNodeSetParams) ZERO(cuGraphReleaseUserObject) ZERO(cuGraphRemoveDependencies)
ZERO(cuGraphRemoveDependencies_v2) ZERO(cuGraphRetainUserObject) ZERO(cuGraphUpload)
ZERO(cuGraphicsMapResources) ZERO(cuGraphicsResourceGetMappedMipmappedArray)
ZERO(cuGraphicsResourceGetMappedPointer) ZERO(cuGraphicsResourceGetMappedPointer_v2)
ZERO(cuGraphicsResourceSetMapFlags) ZERO(cuGraphicsResourceSetMapFlags_v2)
ZERO(cuGraphicsSubResourceGetMappedArray) ZERO(cuGraphicsUnmapResources) ZERO(cuGraphicsUnregisterResource)
ZERO(cuGreenCtxCreate) ZERO(cuGreenCtxDestroy) ZERO(cuGreenCtxGetDevResource) ZERO(cuGreenCtxGetId)
ZERO(cuGreenCtxRecordEvent) ZERO(cuGreenCtxStreamCreate) ZERO(cuGreenCtxWaitEvent)
ZERO(cuImportExternalMemory) ZERO(cuImportExternalSemaphore) ZERO(cuInit) ZERO(cuIpcCloseMemHandle)
ZERO(cuIpcGetEventHandle) ZERO(cuIpcGetMemHandle) ZERO(cuIpcOpenEventHandle) ZERO(cuIpcOpenMemHandle)
ZERO(cuIpcOpenMemHandle_v2) ZERO(cuKernelGetAttribute) ZERO(cuKernelGetLibrary) ZERO(cuKernelGetName)
ZERO(cuKernelGetParamCount) ZERO(cuKernelGetParamInfo) ZERO(cuKernelSetAttribute) ZERO(cuKernelSetCacheConfig)
ZERO(cuLaunch) ZERO(cuLaunchCooperativeKernel) ZERO(cuLaunchCooperativeKernelMultiDevice) ZERO(cuLaunchGrid)
ZERO(cuLaunchGridAsync) ZERO(cuLaunchHostFunc) ZERO(cuLaunchHostFunc_v2) ZERO(cuLibraryEnumerateKernels)
ZERO(cuLibraryGetGlobal) ZERO(cuLibraryGetKernelCount) ZERO(cuLibraryGetManaged) ZERO(cuLibraryGetModule)
ZERO(cuLibraryGetUnifiedFunction) ZERO(cuLibraryLoadFromFile) ZERO(cuLibraryUnload) ZERO(cuLinkAddData)
ZERO(cuLinkAddData_v2) ZERO(cuLinkAddFile) ZERO(cuLinkAddFile_v2) ZERO(cuLinkComplete) ZERO(cuLinkCreate)
ZERO(cuLinkCreate_v2) ZERO(cuLinkDestroy) ZERO(cuLogsCurrent) ZERO(cuLogsDumpToFile) ZERO(cuLogsDumpToMemory)
ZERO(cuLogsRegisterCallback) ZERO(cuLogsUnregisterCallback) ZERO(cuMemAddressFree) ZERO(cuMemAddressReserve)
ZERO(cuMemAdvise) ZERO(cuMemAdvise_v2) ZERO(cuMemAlloc) ZERO(cuMemAllocAsync) ZERO(cuMemAllocFromPoolAsync)
ZERO(cuMemAllocHost) ZERO(cuMemAllocHost_v2) ZERO(cuMemAllocManaged) ZERO(cuMemAllocPitch)
ZERO(cuMemAllocPitch_v2) ZERO(cuMemAlloc_v2) ZERO(cuMemBatchDecompressAsync) ZERO(cuMemCreate)
ZERO(cuMemDiscardAndPrefetchBatchAsync) ZERO(cuMemDiscardBatchAsync) ZERO(cuMemExportToShareableHandle)
ZERO(cuMemFree) ZERO(cuMemFreeAsync) ZERO(cuMemFreeHost) ZERO(cuMemFree_v2) ZERO(cuMemGetAccess)
ZERO(cuMemGetAddressRange) ZERO(cuMemGetAddressRange_v2) ZERO(cuMemGetAllocationGranularity)
ZERO(cuMemGetAllocationPropertiesFromHandle) ZERO(cuMemGetDefaultMemPool) ZERO(cuMemGetHandleForAddressRange)
ZERO(cuMemGetInfo) ZERO(cuMemGetInfo_v2) ZERO(cuMemGetMemPool) ZERO(cuMemHostAlloc)
ZERO(cuMemHostGetDevicePointer) ZERO(cuMemHostGetDevicePointer_v2) ZERO(cuMemHostGetFlags)
ZERO(cuMemHostRegister) ZERO(cuMemHostRegister_v2) ZERO(cuMemHostUnregister)
ZERO(cuMemImportFromShareableHandle) ZERO(cuMemMap) ZERO(cuMemMapArrayAsync) ZERO(cuMemPoolCreate)
ZERO(cuMemPoolDestroy) ZERO(cuMemPoolExportPointer) ZERO(cuMemPoolExportToShareableHandle)
ZERO(cuMemPoolGetAccess) ZERO(cuMemPoolGetAttribute) ZERO(cuMemPoolImportFromShareableHandle)
ZERO(cuMemPoolImportPointer) ZERO(cuMemPoolSetAccess) ZERO(cuMemPoolSetAttribute) ZERO(cuMemPoolTrimTo)
ZERO(cuMemPrefetchAsync) ZERO(cuMemPrefetchAsync_ptsz) ZERO(cuMemPrefetchAsync_v2)
ZERO(cuMemPrefetchBatchAsync) ZERO(cuMemRangeGetAttribute) ZERO(cuMemRangeGetAttributes) ZERO(cuMemRelease)
ZERO(cuMemRetainAllocationHandle) ZERO(cuMemSetAccess) ZERO(cuMemSetMemPool) ZERO(cuMemUnmap) ZERO(cuMemcpy)
ZERO(cuMemcpy2D) ZERO(cuMemcpy2DAsync) ZERO(cuMemcpy2DAsync_v2) ZERO(cuMemcpy2DUnaligned)
ZERO(cuMemcpy2DUnaligned_v2) ZERO(cuMemcpy2D_v2) ZERO(cuMemcpy3D) ZERO(cuMemcpy3DAsync)
ZERO(cuMemcpy3DAsync_v2) ZERO(cuMemcpy3DBatchAsync) ZERO(cuMemcpy3DBatchAsync_ptsz)
ZERO(cuMemcpy3DBatchAsync_v2) ZERO(cuMemcpy3DPeer) ZERO(cuMemcpy3DPeerAsync)
ZERO(cuMemcpy3DWithAttributesAsync) ZERO(cuMemcpy3D_v2) ZERO(cuMemcpyAsync) ZERO(cuMemcpyAtoA)
ZERO(cuMemcpyAtoA_v2) ZERO(cuMemcpyAtoD) ZERO(cuMemcpyAtoD_v2) ZERO(cuMemcpyAtoH) ZERO(cuMemcpyAtoHAsync)
ZERO(cuMemcpyAtoHAsync_v2) ZERO(cuMemcpyAtoH_v2) ZERO(cuMemcpyBatchAsync) ZERO(cuMemcpyBatchAsync_ptsz)
ZERO(cuMemcpyBatchAsync_v2) ZERO(cuMemcpyDtoA) ZERO(cuMemcpyDtoA_v2) ZERO(cuMemcpyDtoD)
ZERO(cuMemcpyDtoDAsync) ZERO(cuMemcpyDtoDAsync_v2) ZERO(cuMemcpyDtoD_v2) ZERO(cuMemcpyDtoH)
ZERO(cuMemcpyDtoHAsync) ZERO(cuMemcpyDtoHAsync_v2) ZERO(cuMemcpyDtoH_v2) ZERO(cuMemcpyHtoA)
ZERO(cuMemcpyHtoAAsync) ZERO(cuMemcpyHtoAAsync_v2) ZERO(cuMemcpyHtoA_v2) ZERO(cuMemcpyHtoD)
ZERO(cuMemcpyHtoDAsync) ZERO(cuMemcpyHtoDAsync_v2) ZERO(cuMemcpyHtoD_v2) ZERO(cuMemcpyPeer)
ZERO(cuMemcpyPeerAsync) ZERO(cuMemcpyWithAttributesAsync) ZERO(cuMemsetD16) ZERO(cuMemsetD16Async)
ZERO(cuMemsetD16_v2) ZERO(cuMemsetD2D16) ZERO(cuMemsetD2D16Async) ZERO(cuMemsetD2D16_v2) ZERO(cuMemsetD2D32)
ZERO(cuMemsetD2D32Async) ZERO(cuMemsetD2D32_v2) ZERO(cuMemsetD2D8) ZERO(cuMemsetD2D8Async)
ZERO(cuMemsetD2D8_v2) ZERO(cuMemsetD32) ZERO(cuMemsetD32Async) ZERO(cuMemsetD32_v2) ZERO(cuMemsetD8)
ZERO(cuMemsetD8Async) ZERO(cuMemsetD8_v2) ZERO(cuMipmappedArrayCreate) ZERO(cuMipmappedArrayDestroy)
ZERO(cuMipmappedArrayGetLevel) ZERO(cuMipmappedArrayGetMemoryRequirements)
ZERO(cuMipmappedArrayGetSparseProperties) ZERO(cuModuleEnumerateFunctions) ZERO(cuModuleGetFunctionCount)
ZERO(cuModuleGetGlobal) ZERO(cuModuleGetGlobal_v2) ZERO(cuModuleGetLoadingMode) ZERO(cuModuleGetSurfRef)
ZERO(cuModuleGetTexRef) ZERO(cuModuleLoadFatBinary) ZERO(cuModuleUnload) ZERO(cuMulticastAddDevice)
ZERO(cuMulticastBindAddr) ZERO(cuMulticastBindAddr_v2) ZERO(cuMulticastBindMem) ZERO(cuMulticastBindMem_v2)
ZERO(cuMulticastCreate) ZERO(cuMulticastGetGranularity) ZERO(cuMulticastUnbind)
ZERO(cuOccupancyAvailableDynamicSMemPerBlock) ZERO(cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags)
ZERO(cuOccupancyMaxPotentialBlockSize) ZERO(cuOccupancyMaxPotentialBlockSizeWithFlags)
ZERO(cuOccupancyMaxPotentialClusterSize) ZERO(cuParamSetSize) ZERO(cuParamSetTexRef) ZERO(cuParamSetf)
ZERO(cuParamSeti) ZERO(cuParamSetv) ZERO(cuPointerGetAttributes) ZERO(cuPointerSetAttribute)
ZERO(cuProfilerStart) ZERO(cuProfilerStop) ZERO(cuSignalExternalSemaphoresAsync) ZERO(cuStreamAddCallback)
ZERO(cuStreamAttachMemAsync) ZERO(cuStreamBatchMemOp) ZERO(cuStreamBatchMemOp_ptsz)
ZERO(cuStreamBatchMemOp_v2) ZERO(cuStreamBeginCapture) ZERO(cuStreamBeginCaptureToCig)
ZERO(cuStreamBeginCaptureToGraph) ZERO(cuStreamBeginCapture_ptsz) ZERO(cuStreamBeginCapture_v2)
ZERO(cuStreamCopyAttributes) ZERO(cuStreamCreate) ZERO(cuStreamCreateWithPriority) ZERO(cuStreamDestroy)
ZERO(cuStreamDestroy_v2) ZERO(cuStreamEndCapture) ZERO(cuStreamEndCaptureToCig) ZERO(cuStreamGetAttribute)
ZERO(cuStreamGetCaptureInfo) ZERO(cuStreamGetCaptureInfo_ptsz) ZERO(cuStreamGetCaptureInfo_v2)
ZERO(cuStreamGetCaptureInfo_v2_ptsz) ZERO(cuStreamGetCaptureInfo_v3) ZERO(cuStreamGetCtx)
ZERO(cuStreamGetCtx_v2) ZERO(cuStreamGetDevResource) ZERO(cuStreamGetDevice) ZERO(cuStreamGetFlags)
ZERO(cuStreamGetGreenCtx) ZERO(cuStreamGetId) ZERO(cuStreamGetPriority) ZERO(cuStreamIsCapturing)
ZERO(cuStreamQuery) ZERO(cuStreamSetAttribute) ZERO(cuStreamSynchronize)
ZERO(cuStreamUpdateCaptureDependencies) ZERO(cuStreamUpdateCaptureDependencies_ptsz)
ZERO(cuStreamUpdateCaptureDependencies_v2) ZERO(cuStreamWaitEvent) ZERO(cuStreamWaitValue32)
ZERO(cuStreamWaitValue32_ptsz) ZERO(cuStreamWaitValue32_v2) ZERO(cuStreamWaitValue64)
ZERO(cuStreamWaitValue64_ptsz) ZERO(cuStreamWaitValue64_v2) ZERO(cuStreamWriteValue32)
ZERO(cuStreamWriteValue32_ptsz) ZERO(cuStreamWriteValue32_v2) ZERO(cuStreamWriteValue64)
ZERO(cuStreamWriteValue64_ptsz) ZERO(cuStreamWriteValue64_v2) ZERO(cuSurfObjectCreate)
ZERO(cuSurfObjectDestroy) ZERO(cuSurfObjectGetResourceDesc) ZERO(cuSurfRefGetArray) ZERO(cuSurfRefSetArray)
ZERO(cuTensorMapEncodeIm2col) ZERO(cuTensorMapEncodeIm2colWide) ZERO(cuTensorMapEncodeTiled)
ZERO(cuTensorMapReplaceAddress) ZERO(cuTexObjectCreate) ZERO(cuTexObjectDestroy)
ZERO(cuTexObjectGetResourceDesc) ZERO(cuTexObjectGetResourceViewDesc) ZERO(cuTexObjectGetTextureDesc)
ZERO(cuTexRefCreate) ZERO(cuTexRefDestroy) ZERO(cuTexRefGetAddress) ZERO(cuTexRefGetAddressMode)
ZERO(cuTexRefGetAddress_v2) ZERO(cuTexRefGetArray) ZERO(cuTexRefGetBorderColor) ZERO(cuTexRefGetFilterMode)
ZERO(cuTexRefGetFlags) ZERO(cuTexRefGetFormat) ZERO(cuTexRefGetMaxAnisotropy)
ZERO(cuTexRefGetMipmapFilterMode) ZERO(cuTexRefGetMipmapLevelBias) ZERO(cuTexRefGetMipmapLevelClamp)
ZERO(cuTexRefGetMipmappedArray) ZERO(cuTexRefSetAddress) ZERO(cuTexRefSetAddress2D)
ZERO(cuTexRefSetAddress2D_v2) ZERO(cuTexRefSetAddress2D_v3) ZERO(cuTexRefSetAddressMode)
ZERO(cuTexRefSetAddress_v2) ZERO(cuTexRefSetArray) ZERO(cuTexRefSetBorderColor) ZERO(cuTexRefSetFilterMode)
ZERO(cuTexRefSetFlags) ZERO(cuTexRefSetFormat) ZERO(cuTexRefSetMaxAnisotropy)
ZERO(cuTexRefSetMipmapFilterMode) ZERO(cuTexRefSetMipmapLevelBias) ZERO(cuTexRefSetMipmapLevelClamp)
ZERO(cuTexRefSetMipmappedArray) ZERO(cuThreadExchangeStreamCaptureMode) ZERO(cuUserObjectCreate)
ZERO(cuUserObjectRelease) ZERO(cuUserObjectRetain) ZERO(cuWaitExternalSemaphoresAsync)