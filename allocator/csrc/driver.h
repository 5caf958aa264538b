// The few CUDA driver types and calls that the allocator uses, declared here so that no toolkit is needed to build,
// and resolved at run time so that the same code runs on libcuda and on the simulated driver.
#pragma once

#include <cstddef>
#include <cstdint>

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUmemGenericAllocationHandle = unsigned long long;

struct CUmemLocation {
  int type;
  int id;
};

struct CUmemAllocationProp {
  int type;
  int requestedHandleTypes;
  CUmemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};

struct CUmemAccessDesc {
  CUmemLocation location;
  int flags;
};

constexpr CUresult CUDA_SUCCESS = 0;
constexpr CUresult CUDA_ERROR_INVALID_VALUE = 1;
constexpr CUresult CUDA_ERROR_OUT_OF_MEMORY = 2;
constexpr CUresult CUDA_ERROR_NOT_INITIALIZED = 3;
constexpr CUresult CUDA_ERROR_NO_DEVICE = 100;
constexpr CUresult CUDA_ERROR_INVALID_DEVICE = 101;
constexpr CUresult CUDA_ERROR_INVALID_IMAGE = 200;
constexpr CUresult CUDA_ERROR_INVALID_CONTEXT = 201;
constexpr CUresult CUDA_ERROR_INVALID_HANDLE = 400;
constexpr CUresult CUDA_ERROR_NOT_FOUND = 500;
constexpr CUresult CUDA_ERROR_NOT_READY = 600;
constexpr CUresult CUDA_ERROR_ILLEGAL_ADDRESS = 700;
constexpr CUresult CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712;
constexpr CUresult CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713;
constexpr CUresult CUDA_ERROR_MISALIGNED_ADDRESS = 716;
constexpr CUresult CUDA_ERROR_NOT_SUPPORTED = 801;
constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900;
constexpr CUresult CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901;
constexpr CUresult CUDA_ERROR_UNKNOWN = 999;

constexpr int CU_MEM_ALLOCATION_TYPE_PINNED = 1;
constexpr int CU_MEM_LOCATION_TYPE_DEVICE = 1;
constexpr int CU_MEM_ACCESS_FLAGS_PROT_READWRITE = 3;
constexpr int CU_MEM_ALLOC_GRANULARITY_MINIMUM = 0;
constexpr unsigned CU_STREAM_NON_BLOCKING = 1;
constexpr unsigned CU_EVENT_DISABLE_TIMING = 2;
constexpr unsigned CU_MEMHOSTREGISTER_PORTABLE = 1;
constexpr int CU_STREAM_CAPTURE_STATUS_NONE = 0;
constexpr int kCaptureModeRelaxed = 2;
constexpr int CU_DEVICE_ATTRIBUTE_INTEGRATED = 18;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75;
constexpr int CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76;
constexpr int CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91;
constexpr int CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102;
constexpr int CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED = 110;
constexpr int CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID = 134;

// X(member, exported symbol, parameters). The exported names carry the version suffixes of the driver's ABI.
#define RA_DRIVER_CALLS(X)                                                                                          \
  X(Init, "cuInit", (unsigned))                                                                                     \
  X(GetErrorName, "cuGetErrorName", (CUresult, const char**))                                                       \
  X(DeviceGet, "cuDeviceGet", (CUdevice*, int))                                                                     \
  X(DeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, CUdevice))                                              \
  X(DeviceTotalMem, "cuDeviceTotalMem_v2", (std::size_t*, CUdevice))                                                \
  X(DevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext*, CUdevice))                                     \
  X(DevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CUdevice))                                            \
  X(CtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext))                                                             \
  X(CtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext*))                                                              \
  X(CtxSynchronize, "cuCtxSynchronize", ())                                                                         \
  X(CtxGetStreamPriorityRange, "cuCtxGetStreamPriorityRange", (int*, int*))                                         \
  X(ModuleLoadData, "cuModuleLoadData", (CUmodule*, const void*))                                                   \
  X(ModuleUnload, "cuModuleUnload", (CUmodule))                                                                     \
  X(ModuleGetFunction, "cuModuleGetFunction", (CUfunction*, CUmodule, const char*))                                 \
  X(LaunchKernel, "cuLaunchKernel",                                                                                 \
    (CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void**, void**))   \
  X(MemGetInfo, "cuMemGetInfo_v2", (std::size_t*, std::size_t*))                                                    \
  X(MemGetAllocationGranularity, "cuMemGetAllocationGranularity", (std::size_t*, const CUmemAllocationProp*, int))  \
  X(MemAddressReserve, "cuMemAddressReserve",                                                                       \
    (CUdeviceptr*, std::size_t, std::size_t, CUdeviceptr, unsigned long long))                                      \
  X(MemAddressFree, "cuMemAddressFree", (CUdeviceptr, std::size_t))                                                 \
  X(MemCreate, "cuMemCreate",                                                                                       \
    (CUmemGenericAllocationHandle*, std::size_t, const CUmemAllocationProp*, unsigned long long))                   \
  X(MemMap, "cuMemMap", (CUdeviceptr, std::size_t, std::size_t, CUmemGenericAllocationHandle, unsigned long long))  \
  X(MemSetAccess, "cuMemSetAccess", (CUdeviceptr, std::size_t, const CUmemAccessDesc*, std::size_t))                \
  X(MemUnmap, "cuMemUnmap", (CUdeviceptr, std::size_t))                                                             \
  X(MemRelease, "cuMemRelease", (CUmemGenericAllocationHandle))                                                     \
  X(MemHostRegister, "cuMemHostRegister_v2", (void*, std::size_t, unsigned))                                        \
  X(MemHostUnregister, "cuMemHostUnregister", (void*))                                                              \
  X(MemcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (CUdeviceptr, const void*, std::size_t, CUstream))                     \
  X(MemcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void*, CUdeviceptr, std::size_t, CUstream))                           \
  X(MemcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", (CUdeviceptr, CUdeviceptr, std::size_t, CUstream))                     \
  X(MemsetD8Async, "cuMemsetD8Async", (CUdeviceptr, unsigned char, std::size_t, CUstream))                          \
  X(StreamCreateWithPriority, "cuStreamCreateWithPriority", (CUstream*, unsigned, int))                             \
  X(StreamDestroy, "cuStreamDestroy_v2", (CUstream))                                                                \
  X(StreamSynchronize, "cuStreamSynchronize", (CUstream))                                                           \
  X(StreamIsCapturing, "cuStreamIsCapturing", (CUstream, int*))                                                     \
  X(EventCreate, "cuEventCreate", (CUevent*, unsigned))                                                             \
  X(EventDestroy, "cuEventDestroy_v2", (CUevent))                                                                   \
  X(EventRecord, "cuEventRecord", (CUevent, CUstream))                                                              \
  X(EventQuery, "cuEventQuery", (CUevent))                                                                          \
  X(EventSynchronize, "cuEventSynchronize", (CUevent))

// Calls that a driver may lack. The last exists only in the simulated driver: the factor between its bytes and the bytes
// it shows (see sim/box.h).
#define RA_DRIVER_OPTIONAL_CALLS(X)                                        \
  X(CtxRecordEvent, "cuCtxRecordEvent", (CUcontext, CUevent))              \
  X(ThreadExchangeStreamCaptureMode, "cuThreadExchangeStreamCaptureMode", (int*)) \
  X(SimScale, "rotatorSimScale", (uint64_t*))

namespace rotator {

struct Driver {
#define RA_MEMBER(member, symbol, parameters) CUresult(*member) parameters = nullptr;
  RA_DRIVER_CALLS(RA_MEMBER)
  RA_DRIVER_OPTIONAL_CALLS(RA_MEMBER)
#undef RA_MEMBER
};

// Resolves the table from `path`, from ROTATOR_CUDA_DRIVER, or from libcuda.so.1, in that order, and initializes the
// driver. Throws Error: kDriverMissing.
Driver load_driver(const char* path);

}  // namespace rotator
