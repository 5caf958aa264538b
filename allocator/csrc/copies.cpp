#include "csrc/copies.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "csrc/error.h"

namespace rotator {

// Parts of one lane alone: longer copies gain nothing, one of this size is as fast as the link.
static constexpr std::size_t kPartMax = 512u << 20;
// Parts of two lanes: small enough that the lanes end together, and so many ahead that a lane does not run dry while
// memory is being mapped (docs/allocator.md).
static constexpr std::size_t kLanePart = 64u << 20;
static constexpr std::size_t kAhead = 8;
static constexpr std::chrono::microseconds kPoll{100};

Copies::Copies(Device& device, const HostArena& arena, Direction direction)
    : device_(device),
      arena_(arena),
      direction_(direction),
      two_lanes_(direction == Direction::kToDevice && device.copy_kernel.ready()) {
  for (std::size_t i = 0; i < lanes_.size(); ++i) lanes_[i].stream = device.copies[i].get();
  lanes_.back().by_kernel = two_lanes_;
}

Copies::~Copies() {
  QuietContext scope(device_);
  for (Lane& lane : lanes_)
    for (CUevent event : lane.running) device_.driver.EventDestroy(event);
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
Copies::Piece Copies::next_part() {
  Piece& first = pieces_.front();
  const std::size_t most = std::min(first.nbytes, two_lanes_ ? kLanePart : kPartMax);
  const Piece part = first.take(arena_.run_bytes(first.host, most));
  if (first.nbytes == 0) pieces_.pop_front();
  return part;
}

bool Copies::has_room(Lane& lane) {
  if (!two_lanes_) return true;
  while (!lane.running.empty()) {
    const CUresult result = device_.driver.EventQuery(lane.running.front());
    if (result == CUDA_ERROR_NOT_READY) break;
    if (result != CUDA_SUCCESS) raise_driver(device_.driver, result, "EventQuery");
    spare_events_.push_back(lane.running.front());
    lane.running.pop_front();
  }
  return lane.running.size() < kAhead;
}

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

void Copies::send(Lane& lane, const Piece& part) {
  const std::size_t whole = lane.by_kernel ? round_down(part.nbytes, CopyKernel::kUnit) : 0;
  if (whole != 0) device_.copy_kernel.launch(part.address, part.host, whole, lane.stream);
  const Piece rest{part.address + whole, part.host + whole, part.nbytes - whole};
  if (rest.nbytes != 0 && direction_ == Direction::kToHost)
    RA_TRY(device_.driver, MemcpyDtoHAsync, rest.host, rest.address, rest.nbytes, lane.stream);
  if (rest.nbytes != 0 && direction_ == Direction::kToDevice)
    RA_TRY(device_.driver, MemcpyHtoDAsync, rest.address, rest.host, rest.nbytes, lane.stream);
  if (two_lanes_) mark(lane);
}

void Copies::pump() {
  for (bool sent = true; sent;) {
    sent = false;
    for (Lane& lane : lanes_) {
      if (pieces_.empty()) return;
      if (!has_room(lane)) continue;
      send(lane, next_part());
      sent = true;
    }
  }
}

void Copies::flush() {
  for (pump(); !pieces_.empty(); pump()) std::this_thread::sleep_for(kPoll);
}

}  // namespace rotator
