#include "csrc/vmm.h"

namespace rotator {

// A card that cannot answer an attribute query lacks the feature: the error ends here and poisons no later call.
static int attribute(const Driver& driver, CUdevice device, int name, int otherwise) {
  int value = 0;
  return driver.DeviceGetAttribute(&value, name, device) == CUDA_SUCCESS ? value : otherwise;
}

static CUmemAllocationProp allocation_prop(const Driver& driver, CUdevice device) {
  CUmemAllocationProp prop{};
  prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  prop.location = {CU_MEM_LOCATION_TYPE_DEVICE, device};
  // NICs register such memory only when it was created for it.
  prop.allocFlags.gpuDirectRDMACapable =
      attribute(driver, device, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED, 0) != 0;
  return prop;
}

void Stream::open(const Driver& driver, int priority) {
  RA_TRY(driver, StreamCreateWithPriority, &stream_, CU_STREAM_NON_BLOCKING, priority);
  driver_ = &driver;
}

void Stream::close() noexcept {
  if (stream_ != nullptr) driver_->StreamDestroy(stream_);
  stream_ = nullptr;
}

Device::Device(const Driver& table, int number)
    : driver(table), index(number), digest(table), pack(table), copy_kernel(table), unpack(table) {
  RA_TRY(driver, DeviceGet, &handle, number);
  RA_TRY(driver, DeviceTotalMem, &total_bytes, handle);
  prop = allocation_prop(driver, handle);
  numa_node = attribute(driver, handle, CU_DEVICE_ATTRIBUTE_HOST_NUMA_ID, -1);
  unified = attribute(driver, handle, CU_DEVICE_ATTRIBUTE_INTEGRATED, 0) != 0;
  RA_TRY(driver, DevicePrimaryCtxRetain, &context, handle);
  try {
    open();
  } catch (...) {
    close();
    throw;
  }
}

Device::~Device() { close(); }

void Device::open() {
  ContextScope scope(*this);
  RA_TRY(driver, MemGetAllocationGranularity, &granularity, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  int lowest = 0, highest = 0;
  RA_TRY(driver, CtxGetStreamPriorityRange, &lowest, &highest);
  for (Stream& stream : copies) stream.open(driver, highest);
  fill.open(driver, highest);
  disk.open(driver, highest);
  background.open(driver, lowest);
  digest.load();
  if (attribute(driver, handle, CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 0) == 0) return;
  copy_kernel.load();
  pack.load();
  unpack.load();
}

void Device::close() noexcept {
  {
    QuietContext scope(*this);
    for (Stream& stream : copies) stream.close();
    fill.close();
    disk.close();
    digest.unload();
    copy_kernel.unload();
    pack.unload();
    unpack.unload();
    background.close();
  }
  driver.DevicePrimaryCtxRelease(handle);
}

void Device::finish() const {
  for (const Stream* stream : used()) RA_TRY(driver, StreamSynchronize, stream->get());
}

void Device::settle() const noexcept {
  QuietContext scope(*this);
  for (const Stream* stream : used()) driver.StreamSynchronize(stream->get());
}

std::size_t Device::bytes_free() const {
  std::size_t free = 0, total = 0;
  QuietContext scope(*this);
  return driver.MemGetInfo(&free, &total) == CUDA_SUCCESS ? free : 0;
}

ContextScope::ContextScope(const Device& device) : driver_(device.driver) {
  RA_TRY(driver_, CtxPushCurrent, device.context);
}

ContextScope::~ContextScope() {
  CUcontext popped = nullptr;
  driver_.CtxPopCurrent(&popped);
}

QuietContext::QuietContext(const Device& device) noexcept
    : driver_(device.driver), pushed_(driver_.CtxPushCurrent(device.context) == CUDA_SUCCESS) {}

QuietContext::~QuietContext() {
  CUcontext popped = nullptr;
  if (pushed_) driver_.CtxPopCurrent(&popped);
}

Reservation::Reservation(const Device& device, std::size_t nbytes) : driver_(device.driver), nbytes_(nbytes) {
  RA_TRY(driver_, MemAddressReserve, &address_, nbytes, 0, 0, 0);
}

Reservation::~Reservation() { driver_.MemAddressFree(address_, nbytes_); }

Allocation::Allocation(const Device& device, std::size_t nbytes) : driver_(device.driver) {
  RA_TRY(driver_, MemCreate, &handle_, nbytes, &device.prop, 0);
}

CUresult Allocation::release() noexcept {
  if (handle_ == 0) return CUDA_SUCCESS;
  const CUresult result = driver_.MemRelease(handle_);
  if (result == CUDA_SUCCESS) handle_ = 0;
  return result;
}

}  // namespace rotator
