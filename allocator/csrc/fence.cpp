#include "csrc/fence.h"

#include <map>

#include "csrc/error.h"

namespace rotator {

static constexpr std::size_t kEntriesMax = 1024;

// True: recorded. False: this driver has no such call. Anything else is an error.
static bool record(Device& device, CUevent event) {
  if (device.driver.CtxRecordEvent == nullptr) return false;
  const CUresult result = device.driver.CtxRecordEvent(device.context, event);
  if (result == CUDA_SUCCESS) return true;
  if (result == CUDA_ERROR_NOT_SUPPORTED) return false;
  raise_driver(device.driver, result, "CtxRecordEvent");
}

Fence::Fence(Device& device) : device_(device) {
  ContextScope scope(device);
  RA_TRY(device.driver, EventCreate, &event_, CU_EVENT_DISABLE_TIMING);
  try {
    if (record(device, event_)) return;
    RA_TRY(device.driver, CtxSynchronize);
  } catch (...) {
    device.driver.EventDestroy(event_);
    throw;
  }
  device.driver.EventDestroy(event_);
  event_ = nullptr;
}

Fence::~Fence() {
  if (event_ != nullptr) device_.driver.EventDestroy(event_);
}

bool Fence::passed() const { return event_ == nullptr || device_.driver.EventQuery(event_) == CUDA_SUCCESS; }

void Fence::wait() const {
  if (event_ != nullptr) RA_TRY(device_.driver, EventSynchronize, event_);
}

void FreeQueue::record_missing() {
  std::map<Device*, std::shared_ptr<Fence>> fences;
  for (Entry& entry : entries_) {
    if (entry.fence) continue;
    auto& fence = fences[&entry.pool->device];
    if (!fence) fence = std::make_shared<Fence>(entry.pool->device);
    entry.fence = fence;
  }
}

void FreeQueue::give(const Entry& entry) {
  entry.pool->bytes_deferred -= entry.nbytes;
  entry.pool->give(entry.offset, entry.nbytes);
}

void FreeQueue::push(Pool& pool, std::size_t offset, std::size_t nbytes, bool capturing) {
  entries_.push_back({&pool, offset, nbytes, nullptr});
  pool.bytes_deferred += nbytes;
  // Recording would invalidate a running capture.
  if (capturing) return;
  try {
    record_missing();
    if (entries_.size() > kEntriesMax) entries_.front().fence->wait();
  } catch (const Error&) {
    // A free has nobody to tell. What is unfenced stays mapped, and drain() meets the same error and reports it.
  }
}

void FreeQueue::poll(bool capturing) {
  if (capturing) return;
  while (!entries_.empty() && entries_.front().fence && entries_.front().fence->passed()) {
    give(entries_.front());
    entries_.pop_front();
  }
}

void FreeQueue::drain(bool capturing) {
  if (entries_.empty()) return;
  if (capturing) raise(RA_CAPTURING, "a graph capture is running: end it before memory is given back");
  record_missing();
  while (!entries_.empty()) {
    entries_.front().fence->wait();
    give(entries_.front());
    entries_.pop_front();
  }
}

}  // namespace rotator
