// The C boundary: one mutex around every call, and Error turned into the caller's ra_error.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>

#include "csrc/api.h"
#include "csrc/background.h"
#include "csrc/error.h"
#include "csrc/state.h"
#include "csrc/torch.h"

using rotator::Background;
using rotator::Error;
using rotator::State;

struct ra_allocator {
  ra_allocator(rotator::Driver driver, const ra_config& config)
      : state(driver, config), background(mutex, state, config.link_share_permille / 1000.0) {}
  std::mutex mutex;
  State state;
  Background background;  // ends before what it works on
};

static void fill(ra_error* out, const Error& error) {
  if (out == nullptr) return;
  *out = {};
  out->code = error.code;
  out->driver_code = error.driver_code;
  out->bytes_wanted = error.bytes_wanted;
  out->bytes_free = error.bytes_free;
  std::snprintf(out->call, sizeof out->call, "%s%s", *error.call != '\0' ? "cu" : "", error.call);
  std::snprintf(out->message, sizeof out->message, "%s", error.message.c_str());
}

template <typename Body>
static int guarded(ra_error* out, Body body) {
  try {
    body();
    return RA_OK;
  } catch (const Error& error) {
    fill(out, error);
    return error.code;
  } catch (const std::exception& error) {
    Error internal;
    internal.code = RA_INTERNAL;
    internal.message = error.what();
    fill(out, internal);
    return RA_INTERNAL;
  }
}

template <typename Body>
static int locked(ra_allocator* allocator, ra_error* out, Body body) {
  return guarded(out, [&] {
    const std::lock_guard<std::mutex> lock(allocator->mutex);
    body(allocator->state);
  });
}

template <typename Body>
static int reported(ra_allocator* allocator, ra_report* report, ra_error* out, Body body) {
  ra_report filled{};
  const int code = guarded(out, [&] {
    const Background::Pause pause(allocator->background);
    const std::lock_guard<std::mutex> lock(allocator->mutex);
    body(allocator->state, filled);
  });
  if (report != nullptr) *report = filled;
  return code;
}

static void check(const ra_config& config) {
  if (config.slab_bytes == 0 || config.chunk_bytes == 0 || config.link_share_permille == 0 ||
      config.link_share_permille > 1000)
    rotator::raise(RA_INVALID_SIZE, "slab and chunk need at least one byte, the link's share 1 to 1000 per mille");
}

int ra_open(const char* driver_path, const ra_config* config, ra_allocator** out, ra_error* error) {
  return guarded(error, [&] {
    check(*config);
    *out = new ra_allocator(rotator::load_driver(driver_path), *config);
  });
}

int ra_close(ra_allocator* allocator, ra_error* error) {
  rotator::torch_unbind(allocator);
  return guarded(error, [&] { delete allocator; });
}

int ra_scale(const char* driver_path, uint64_t* scale, int* simulated, ra_error* error) {
  return guarded(error, [&] {
    const rotator::Driver driver = rotator::load_driver(driver_path);
    *scale = 1;
    *simulated = driver.SimScale != nullptr;
    if (*simulated) RA_TRY(driver, SimScale, scale);
  });
}

int ra_alloc(ra_allocator* allocator, size_t nbytes, int device, int tag, uint64_t* address, ra_error* error) {
  return locked(allocator, error, [&](State& state) { *address = state.alloc(nbytes, device, tag); });
}

int ra_free(ra_allocator* allocator, uint64_t address, void* stream, ra_error* error) {
  return locked(allocator, error, [&](State& state) { state.free(address, static_cast<CUstream>(stream)); });
}

int ra_write(ra_allocator* allocator, uint64_t address, size_t offset, const void* data, size_t nbytes,
             ra_error* error) {
  return locked(allocator, error, [&](State& state) { state.write(address, offset, data, nbytes); });
}

int ra_read(ra_allocator* allocator, uint64_t address, size_t offset, void* data, size_t nbytes, ra_error* error) {
  return locked(allocator, error, [&](State& state) { state.read(address, offset, data, nbytes); });
}

int ra_sleep(ra_allocator* allocator, uint32_t tags, uint32_t offload, int strict, uint64_t bytes_wanted,
             ra_report* report, ra_error* error) {
  return reported(allocator, report, error, [&](State& state, ra_report& filled) {
    state.sleep(tags, offload, strict != 0, bytes_wanted, filled);
  });
}

int ra_wake(ra_allocator* allocator, uint32_t tags, int strict, ra_report* report, ra_error* error) {
  return reported(allocator, report, error,
                  [&](State& state, ra_report& filled) { state.wake(tags, strict != 0, filled); });
}

int ra_prepare(ra_allocator* allocator, uint32_t tags, ra_report* report, ra_error* error) {
  return reported(allocator, report, error, [&](State& state, ra_report& filled) { state.prepare(tags, filled); });
}

int ra_prepare_start(ra_allocator* allocator, uint32_t tags, ra_error* error) {
  return guarded(error, [&] { allocator->background.start(tags); });
}

int ra_prepare_status(ra_allocator* allocator, ra_prepare_state* state) {
  return guarded(nullptr, [&] { *state = allocator->background.status(); });
}

int ra_pin(ra_allocator* allocator, uint64_t address, ra_error* error) {
  return locked(allocator, error, [&](State& state) { state.pin(address); });
}

int ra_unpin(ra_allocator* allocator, uint64_t address, ra_error* error) {
  return locked(allocator, error, [&](State& state) { state.unpin(address); });
}

int ra_place_masters(ra_allocator* allocator, int on_disk, uint64_t* bytes_moved, ra_error* error) {
  return guarded(error, [&] {
    const Background::Pause pause(allocator->background);
    const std::lock_guard<std::mutex> lock(allocator->mutex);
    *bytes_moved = allocator->state.place_masters(on_disk != 0);
  });
}

int ra_set_host_budget(ra_allocator* allocator, uint64_t nbytes, ra_error* error) {
  return locked(allocator, error, [&](State& state) { state.masters().arena().set_budget(nbytes); });
}

int ra_release_masters(ra_allocator* allocator, uint32_t tags, uint64_t* nbytes, ra_error* error) {
  return locked(allocator, error, [&](State& state) { *nbytes = state.release_masters(tags); });
}

int ra_collect(ra_allocator* allocator, uint64_t* nbytes, ra_error* error) {
  return locked(allocator, error, [&](State& state) { *nbytes = state.collect(); });
}

int ra_capture(ra_allocator* allocator, int begin, ra_error* error) {
  return locked(allocator, error, [&](State& state) { state.capture(begin != 0); });
}

int ra_asleep_tags(ra_allocator* allocator, uint32_t* tags) {
  return locked(allocator, nullptr, [&](State& state) { *tags = state.asleep_tags(); });
}

int ra_memory_usage(ra_allocator* allocator, ra_usage* rows, size_t capacity, size_t* count) {
  return locked(allocator, nullptr, [&](State& state) {
    const auto usage = state.usage();
    *count = usage.size();
    std::copy_n(usage.begin(), std::min(capacity, usage.size()), rows);
  });
}

int ra_host_memory(ra_allocator* allocator, ra_host_usage* usage) {
  return locked(allocator, nullptr, [&](State& state) { *usage = state.host_usage(); });
}

int ra_device_memory(ra_allocator* allocator, int device, uint64_t* free, uint64_t* total, ra_error* error) {
  return locked(allocator, error, [&](State& state) { state.device_memory(device, *free, *total); });
}
