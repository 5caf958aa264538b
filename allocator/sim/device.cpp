#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "sim/sim.h"

using namespace sim;

SIM_EXPORT CUresult cuInit(unsigned) {
  SIM_ENTER("cuInit");
  Sim& s = ::sim::sim();
  const Lock lock(s.mutex);
  Box* box = Box::open();
  SIM_CHECK(box != nullptr, CUDA_ERROR_NOT_INITIALIZED);
  SIM_CHECK(s.box == nullptr || s.pid == getpid(), CUDA_ERROR_NOT_INITIALIZED);  // a fork has no context
  s.box = box;
  s.pid = getpid();
  s.visible = visible_devices(box->config(), "CUDA_VISIBLE_DEVICES");
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

struct NamedResult {
  CUresult result;
  const char* name;
};

static constexpr NamedResult kNames[] = {
    {CUDA_SUCCESS, "CUDA_SUCCESS"},
    {CUDA_ERROR_INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {CUDA_ERROR_INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
    {CUDA_ERROR_INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
    {CUDA_ERROR_INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
    {CUDA_ERROR_NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {CUDA_ERROR_NOT_READY, "CUDA_ERROR_NOT_READY"},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
    {CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"},
    {CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
    {CUDA_ERROR_MISALIGNED_ADDRESS, "CUDA_ERROR_MISALIGNED_ADDRESS"},
    {CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
    {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
    {CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    {CUDA_ERROR_UNKNOWN, "CUDA_ERROR_UNKNOWN"},
};

SIM_EXPORT CUresult cuGetErrorName(CUresult result, const char** name) {
  *name = nullptr;
  for (const auto& known : kNames)
    if (known.result == result) *name = known.name;
  return *name != nullptr ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

SIM_EXPORT CUresult cuDeviceGetCount(int* count) {
  SIM_CALL("cuDeviceGetCount");
  *count = static_cast<int>(s.visible.size());
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  SIM_CALL("cuDeviceGet");
  SIM_CHECK(ordinal >= 0 && ordinal < static_cast<int>(s.visible.size()), CUDA_ERROR_INVALID_DEVICE);
  *device = ordinal;
  return CUDA_SUCCESS;
}

static bool known(const Sim& s, CUdevice device) {
  return device >= 0 && device < static_cast<int>(s.visible.size());
}

SIM_EXPORT CUresult cuDeviceGetName(char* name, int length, CUdevice device) {
  SIM_CALL("cuDeviceGetName");
  SIM_CHECK(known(s, device), CUDA_ERROR_INVALID_DEVICE);
  std::snprintf(name, length, "%s", s.box->config().name.c_str());
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuDeviceGetPCIBusId(char* id, int length, CUdevice device) {
  SIM_CALL("cuDeviceGetPCIBusId");
  SIM_CHECK(known(s, device), CUDA_ERROR_INVALID_DEVICE);
  std::snprintf(id, length, "0000:%02X:00.0", s.visible[device] + 1);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuDeviceTotalMem_v2(std::size_t* nbytes, CUdevice device) {
  SIM_CALL("cuDeviceTotalMem");
  SIM_CHECK(known(s, device), CUDA_ERROR_INVALID_DEVICE);
  *nbytes = s.box->device_bytes();
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  SIM_CALL("cuDeviceGetAttribute");
  SIM_CHECK(known(s, device), CUDA_ERROR_INVALID_DEVICE);
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: *value = s.box->config().integrated; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = s.box->config().capability_major; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = s.box->config().capability_minor; break;
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED: *value = 1; break;
    case CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID: *value = 0; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  SIM_CALL("cuDevicePrimaryCtxRetain");
  SIM_CHECK(known(s, device), CUDA_ERROR_INVALID_DEVICE);
  const int index = s.visible[device];
  auto& slot = s.contexts[index];
  if (!slot) slot.reset(new CUctx_st{index});
  const BoxConfig& config = s.box->config();
  if (slot->references == 0 && !s.box->take(index, config.context_bytes / config.scale))
    return CUDA_ERROR_OUT_OF_MEMORY;
  ++slot->references;
  *context = slot.get();
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  SIM_CALL("cuDevicePrimaryCtxRelease");
  SIM_CHECK(known(s, device), CUDA_ERROR_INVALID_DEVICE);
  const auto found = s.contexts.find(s.visible[device]);
  SIM_CHECK(found != s.contexts.end() && found->second->references > 0, CUDA_ERROR_INVALID_CONTEXT);
  if (--found->second->references == 0)
    s.box->give(found->first, s.box->config().context_bytes / s.box->config().scale);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  SIM_CALL("cuMemGetInfo");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  *total = s.box->device_bytes();
  const uint64_t used = s.box->bytes_used(current()->device);
  *free = used < *total ? *total - used : 0;
  return CUDA_SUCCESS;
}
