// Copies, fills and kernels: work in streams. The device's side is checked when the work ends, not when it is queued:
// memory unmapped under it is an illegal address, and from then on nothing works.
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iterator>

#include "sim/sim.h"

namespace sim {

static Clock::duration time_at(double gib_s, std::size_t nbytes) {
  if (gib_s <= 0) return {};
  const double shown_gib = static_cast<double>(nbytes) * static_cast<double>(sim().box->config().scale) / (1u << 30);
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(shown_gib / gib_s));
}

Clock::duration link_time(std::size_t nbytes) { return time_at(sim().box->config().copy_gib_s, nbytes); }

// What stays on the device: it costs the device's own time and leaves the link alone.
Clock::duration device_time(std::size_t nbytes) { return time_at(sim().box->config().device_gib_s, nbytes); }

static void* at(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

bool is_registered(const void* data, std::size_t nbytes) {
  const auto* start = static_cast<const char*>(data);
  auto it = sim().registered.upper_bound(start);
  if (it == sim().registered.begin()) return false;
  --it;
  return start + nbytes <= it->first + it->second;
}

// Kernels see pages, and cross from one registration into the next.
bool kernels_can_read(const void* data, std::size_t nbytes) {
  const auto* at = static_cast<const char*>(data);
  const char* const end = at + nbytes;
  while (at < end) {
    auto it = sim().registered.upper_bound(at);
    if (it == sim().registered.begin()) return false;
    --it;
    if (it->first + it->second <= at) return false;
    at = it->first + it->second;
  }
  return true;
}

// A copy that begins in one registration and ends beyond it is refused, as by a GPU's driver (580, 2026-11-21).
static bool leaves_registration(const void* data, std::size_t nbytes) {
  return is_registered(data, 1) && !is_registered(data, nbytes);
}

// Memory that was given back is cleared by the engine that also copies to the device, after the fact.
void engine_clears(int device, std::size_t nbytes) {
  Clock::time_point& until = sim().clearing[device];
  until = std::max(until, Clock::now()) + time_at(sim().box->config().clear_gib_s, nbytes);
}

static CUresult move(void* to, const void* from, CUdeviceptr device_side, std::size_t nbytes) {
  if (!accessible(device_side, nbytes)) return CUDA_ERROR_ILLEGAL_ADDRESS;
  std::memcpy(to, from, nbytes);
  return CUDA_SUCCESS;
}

// One half when it starts and the other when it ends: whoever changes the source meanwhile gets a torn copy.
static void split(Op& op, const std::function<CUresult(std::size_t, std::size_t)>& part, std::size_t nbytes) {
  op.begun = [=] { return part(0, nbytes / 2); };
  op.effect = [=] { return part(nbytes / 2, nbytes - nbytes / 2); };
}

// Pageable host memory makes an asynchronous copy wait, as on a GPU.
static CUresult copy(Lock& lock, int direction, void* to, const void* from, std::size_t nbytes, CUstream stream,
                     bool wait) {
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr, CUDA_ERROR_INVALID_HANDLE);
  const void* host = direction == kToDevice ? from : to;
  const auto device_side = reinterpret_cast<CUdeviceptr>(direction == kToDevice ? to : from);
  SIM_CHECK(accessible(device_side, nbytes), CUDA_ERROR_INVALID_VALUE);
  SIM_CHECK(nbytes == 0 || !leaves_registration(host, nbytes), CUDA_ERROR_INVALID_VALUE);
  Op op;
  auto part = [=](std::size_t offset, std::size_t length) {
    return move(static_cast<char*>(to) + offset, static_cast<const char*>(from) + offset, device_side + offset, length);
  };
  split(op, part, nbytes);
  op.touches[0] = {device_side, nbytes};
  op.host = {reinterpret_cast<CUdeviceptr>(host), nbytes};
  op.cost = link_time(nbytes);
  op.link = &sim().links[stream->device][direction];
  if (direction == kToDevice) {
    op.wire = &sim().wires[stream->device];
    op.clearing = &sim().clearing[stream->device];
  }
  const bool blocks = wait || !is_registered(host, nbytes);
  if (const CUresult result = enqueue(stream, std::move(op))) return result;
  return blocks ? wait_for(lock, [&] { return stream->ops.empty(); }) : CUDA_SUCCESS;
}

static CUresult fill(CUdeviceptr address, int value, std::size_t nbytes) {
  if (!accessible(address, nbytes)) return CUDA_ERROR_ILLEGAL_ADDRESS;
  std::memset(reinterpret_cast<void*>(address), value, nbytes);
  return CUDA_SUCCESS;
}

}  // namespace sim

using namespace sim;

SIM_EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, std::size_t nbytes, CUstream stream) {
  SIM_CALL("cuMemcpyHtoDAsync");
  return copy(lock, kToDevice, at(to), from, nbytes, stream, false);
}

SIM_EXPORT CUresult cuMemcpyDtoHAsync_v2(void* to, CUdeviceptr from, std::size_t nbytes, CUstream stream) {
  SIM_CALL("cuMemcpyDtoHAsync");
  return copy(lock, kToHost, to, at(from), nbytes, stream, false);
}

SIM_EXPORT CUresult cuMemcpyHtoD_v2(CUdeviceptr to, const void* from, std::size_t nbytes) {
  SIM_CALL("cuMemcpyHtoD");
  if (const CUresult broken = break_captures()) return broken;
  return copy(lock, kToDevice, at(to), from, nbytes, nullptr, true);
}

SIM_EXPORT CUresult cuMemcpyDtoH_v2(void* to, CUdeviceptr from, std::size_t nbytes) {
  SIM_CALL("cuMemcpyDtoH");
  if (const CUresult broken = break_captures()) return broken;
  return copy(lock, kToHost, to, at(from), nbytes, nullptr, true);
}

SIM_EXPORT CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, std::size_t nbytes, CUstream stream) {
  SIM_CALL("cuMemsetD8Async");
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr, CUDA_ERROR_INVALID_HANDLE);
  SIM_CHECK(accessible(address, nbytes), CUDA_ERROR_INVALID_VALUE);
  Op op;
  op.effect = [=] { return fill(address, value, nbytes); };
  op.touches[0] = {address, nbytes};
  op.cost = device_time(nbytes);
  return enqueue(stream, std::move(op));
}

SIM_EXPORT CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, std::size_t nbytes, CUstream stream) {
  SIM_CALL("cuMemcpyDtoDAsync");
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr, CUDA_ERROR_INVALID_HANDLE);
  SIM_CHECK(accessible(to, nbytes) && accessible(from, nbytes), CUDA_ERROR_INVALID_VALUE);
  Op op;
  auto part = [=](std::size_t offset, std::size_t length) {
    if (!accessible(to + offset, length)) return CUDA_ERROR_ILLEGAL_ADDRESS;
    return move(at(to + offset), at(from + offset), from + offset, length);
  };
  split(op, part, nbytes);
  op.touches = {Span{to, nbytes}, Span{from, nbytes}};
  op.cost = device_time(nbytes);
  return enqueue(stream, std::move(op));
}

SIM_EXPORT CUresult cuMemHostRegister_v2(void* data, std::size_t nbytes, unsigned) {
  SIM_CALL("cuMemHostRegister");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  const auto* start = static_cast<const char*>(data);
  const auto next = s.registered.lower_bound(start + nbytes);
  const bool overlaps = next != s.registered.begin() && std::prev(next)->first + std::prev(next)->second > start;
  SIM_CHECK(!overlaps, CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  // Unified memory: pinned host pages and device pages are the same RAM.
  SIM_CHECK(!s.box->config().integrated || s.box->take(current()->device, nbytes), CUDA_ERROR_OUT_OF_MEMORY);
  s.registered.emplace(start, nbytes);
  return CUDA_SUCCESS;
}

SIM_EXPORT CUresult cuMemHostUnregister(void* data) {
  SIM_CALL("cuMemHostUnregister");
  SIM_CHECK(current() != nullptr, CUDA_ERROR_INVALID_CONTEXT);
  const auto known = s.registered.find(static_cast<const char*>(data));
  SIM_CHECK(known != s.registered.end(), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
  pump();
  if (queued_with_host(data, known->second)) s.sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
  if (s.box->config().integrated) s.box->give(current()->device, known->second);
  s.registered.erase(known);
  return CUDA_SUCCESS;
}

// A kernel that fills a range when it ends. `held` kernels wait until nothing is held: see rotatorSimHold.
SIM_EXPORT CUresult rotatorSimLaunch(CUstream stream, CUdeviceptr address, std::size_t nbytes, int value, int held) {
  SIM_CALL("rotatorSimLaunch");
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr, CUDA_ERROR_INVALID_HANDLE);
  Op op;
  op.effect = [=] { return fill(address, value, nbytes); };
  op.touches[0] = {address, nbytes};
  op.held = held != 0;
  return enqueue(stream, std::move(op));
}

// A kernel that writes for so long: whenever anybody asks the driver anything, `last` or something else, at
// random, so that whoever looks twice sees two things, one of which may be what is there in the end. `last` when it ends.
SIM_EXPORT CUresult rotatorSimWriter(CUstream stream, CUdeviceptr address, std::size_t nbytes, int last,
                                     unsigned duration_ms) {
  SIM_CALL("rotatorSimLaunch");
  stream = stream_or_default(stream);
  SIM_CHECK(stream != nullptr, CUDA_ERROR_INVALID_HANDLE);
  Op op;
  const auto draw = std::make_shared<uint32_t>(static_cast<uint32_t>(last));
  op.always = [=] {
    *draw = *draw * 1664525u + 1013904223u;
    return fill(address, *draw >> 31 != 0 ? last : static_cast<int>(*draw >> 16 & 0xFF), nbytes);
  };
  op.effect = [=] { return fill(address, last, nbytes); };
  op.touches[0] = {address, nbytes};
  op.cost = std::chrono::milliseconds(duration_ms);
  return enqueue(stream, std::move(op));
}
