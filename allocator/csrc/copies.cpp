#include "csrc/copies.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "csrc/clock.h"
#include "csrc/error.h"

namespace rotator {

// Longer copies gain nothing: one of this size is as fast as the link.
static constexpr std::size_t kCopyMax = 512u << 20;
// A free engine brings one granule, 2 MiB, in 40 us over a Gen5 link, in 150 us over Gen3. One that clears memory
// answers after milliseconds, but not every time: only several quick answers in a row count.
static constexpr double kProbeSeconds = 400e-6;
static constexpr int kProbes = 8;
// Parts in lanes, of 64 MiB on a GPU: small enough that the lanes end together; so many ahead that none runs dry during
// a step of mapping. On an H200 half as many kernels ahead cost 4 % of a wake, more gained nothing.
static constexpr std::size_t kLaneGranules = 32;
static constexpr std::size_t kKernelsAhead = 16, kEngineAhead = 8;
// The engine is free when it does this share of a window of parts: it does next to none while it clears, half or more
// beside kernels when it does not.
static constexpr std::size_t kWindow = 16, kFreePercent = 40;
// Chunks of 32 MiB that each lane unpacks ahead: as many bytes as the kernels' lane has.
static constexpr std::size_t kUnpacksAhead = 16;
static constexpr std::chrono::microseconds kPoll{100};

Copies::Copies(Device& device, const HostArena& arena, Direction direction)
    : device_(device),
      arena_(arena),
      direction_(direction),
      mode_(direction == Direction::kToDevice && device.copy_kernel.ready() ? Mode::kUnknown : Mode::kEngine) {
  engine_.stream = device.copies[0].get();
  kernels_.stream = device.copies[kCopyStreams - 1].get();
  for (int i = 0; i < kCopyStreams; ++i) unpacks_[i].stream = device.copies[i].get();
}

Copies::~Copies() {
  for (const Lane* lane : {&engine_, &kernels_, &unpacks_[0], &unpacks_[1]})
    for (CUevent event : lane->running) device_.driver.EventDestroy(event);
  for (CUevent event : spare_events_) device_.driver.EventDestroy(event);
}

Copies::Piece Copies::Piece::take(std::size_t front) {
  const Piece head{address, host, front};
  *this = {address + front, host + front, nbytes - front};
  return head;
}

void Copies::add(CUdeviceptr address, unsigned char* host, std::size_t nbytes) {
  if (!pieces_.empty()) {
    Piece& last = pieces_.back();
    if (last.address + last.nbytes == address && last.host + last.nbytes == host) {
      last.nbytes += nbytes;
      return;
    }
  }
  pieces_.push_back({address, host, nbytes});
}

// One copy may not cross from one registration into the next.
Copies::Piece Copies::next_part(std::size_t most) {
  Piece& first = pieces_.front();
  const Piece part = first.take(arena_.run_bytes(first.host, std::min(first.nbytes, most)));
  if (first.nbytes == 0) pieces_.pop_front();
  return part;
}

void Copies::copy(const Piece& part, CUstream stream) {
  if (direction_ == Direction::kToHost) {
    RA_TRY(device_.driver, MemcpyDtoHAsync, part.host, part.address, part.nbytes, stream);
  } else {
    RA_TRY(device_.driver, MemcpyHtoDAsync, part.address, part.host, part.nbytes, stream);
  }
}

void Copies::copy_by_kernel(const Piece& part, CUstream stream) {
  Piece rest = part;
  const Piece whole = rest.take(round_down(part.nbytes, CopyKernel::kUnit));
  if (whole.nbytes != 0) device_.copy_kernel.launch(whole.address, whole.host, whole.nbytes, stream);
  if (rest.nbytes != 0) copy(rest, stream);
}

// Copies the first bytes through the engine, bit by bit, and looks how long that takes.
bool Copies::engine_is_free() {
  for (int i = 0; i < kProbes && !pieces_.empty(); ++i) {
    const Piece part = next_part(device_.granularity);
    const Stopwatch watch;
    copy(part, engine_.stream);
    RA_TRY(device_.driver, StreamSynchronize, engine_.stream);
    if (watch.seconds() > kProbeSeconds) return false;
  }
  return true;
}

// -- two lanes --

// Counts what has ended in `lane`.
void Copies::look(Lane& lane) {
  while (!lane.running.empty()) {
    const CUresult result = device_.driver.EventQuery(lane.running.front());
    if (result == CUDA_ERROR_NOT_READY) return;
    if (result != CUDA_SUCCESS) raise_driver(device_.driver, result, "EventQuery");
    spare_events_.push_back(lane.running.front());
    lane.running.pop_front();
    ++lane.done;
  }
}

void Copies::compare() {
  const std::size_t done = engine_.done + kernels_.done;
  if (done < kWindow) return;
  if (100 * engine_.done > kFreePercent * done) engine_free_ = true;
  engine_.done = kernels_.done = 0;
}

bool Copies::engine_has_room() { return mapped_ && engine_.running.size() < kEngineAhead; }
bool Copies::kernels_have_room() { return !engine_free_ && kernels_.running.size() < kKernelsAhead; }

void Copies::mark(Lane& lane) {
  if (spare_events_.empty()) {
    CUevent event = nullptr;
    RA_TRY(device_.driver, EventCreate, &event, CU_EVENT_DISABLE_TIMING);
    spare_events_.push_back(event);
  }
  RA_TRY(device_.driver, EventRecord, spare_events_.back(), lane.stream);
  lane.running.push_back(spare_events_.back());
  spare_events_.pop_back();
}

void Copies::pump_lanes() {
  const std::size_t part = kLaneGranules * device_.granularity;
  look(engine_);
  look(kernels_);
  compare();
  while (!pieces_.empty() && (engine_has_room() || kernels_have_room())) {
    if (engine_has_room()) {
      copy(next_part(part), engine_.stream);
      mark(engine_);
    }
    if (!pieces_.empty() && kernels_have_room()) {
      copy_by_kernel(next_part(part), kernels_.stream);
      mark(kernels_);
    }
  }
}

// -- packed chunks --

void Copies::pump_packed() {
  for (Lane& lane : unpacks_) look(lane);
  while (!packed_.empty()) {
    Lane& lane = unpacks_[unpacks_[0].running.size() <= unpacks_[1].running.size() ? 0 : 1];
    if (lane.running.size() >= kUnpacksAhead) return;
    const Packed& next = packed_.front();
    device_.unpack.launch(reinterpret_cast<CUdeviceptr>(next.host), next.packed_nbytes, next.nbytes, next.chunk,
                          next.wanted, lane.stream);
    packed_.pop_front();
    mark(lane);
  }
}

// -- one lane --

void Copies::pump_engine() {
  while (!pieces_.empty()) copy(next_part(kCopyMax), device_.copies[next_++ % kCopyStreams].get());
}

void Copies::pump() {
  pump_packed();
  if (pieces_.empty()) return;
  if (mode_ == Mode::kUnknown) mode_ = engine_is_free() ? Mode::kEngine : Mode::kTwoLanes;
  if (mode_ == Mode::kEngine) {
    pump_engine();
  } else {
    pump_lanes();
  }
}

void Copies::flush() {
  mapped_ = true;
  for (pump(); !pieces_.empty() || !packed_.empty(); pump()) std::this_thread::sleep_for(kPoll);
}

}  // namespace rotator
