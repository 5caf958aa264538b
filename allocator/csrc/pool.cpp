#include "csrc/pool.h"

#include <algorithm>
#include <iterator>
#include <string>

#include "csrc/error.h"

namespace rotator {

// Addresses cost nothing; room to spare keeps large segments placeable whatever was freed before.
static constexpr std::size_t kAddressFactor = 4;
// A pool grows by this part of what it holds, so that small segments share handles and yet what is held beyond need
// stays under 2 % of the pool.
static constexpr std::size_t kSparePart = 64;

Pool::Pool(Device& owner, int name, std::size_t slab)
    : device(owner),
      tag(name),
      slab_bytes(slab),
      reservation_(owner, round_up(owner.total_bytes * kAddressFactor, slab)),
      ranges_(reservation_.nbytes()) {}

Pool::~Pool() {
  QuietContext scope(device);
  for (const Range& run : mapped_runs()) unmap(run);
}

// The first slot that ends behind `offset`.
Pool::SlotMap::const_iterator Pool::first_over(std::size_t offset) const {
  auto it = slots_.upper_bound(offset);
  if (it != slots_.begin() && std::prev(it)->first + std::prev(it)->second.nbytes > offset) --it;
  return it;
}

std::vector<Range> Pool::missing(Range range) const {
  std::vector<Range> gaps;
  std::size_t at = range.begin;
  for (auto it = first_over(at); it != slots_.end() && it->first < range.end; ++it) {
    if (it->first > at) gaps.push_back({at, it->first});
    at = it->first + it->second.nbytes;
  }
  if (at < range.end) gaps.push_back({at, range.end});
  return gaps;
}

std::size_t Pool::bytes_missing(Range range) const {
  std::size_t nbytes = 0;
  for (const Range& gap : missing(range)) nbytes += gap.nbytes();
  return nbytes;
}

// Where the least has to be created; the lowest such place. Each free range is tried from its start and from the first
// slot in it.
std::size_t Pool::place(std::size_t nbytes) const {
  std::optional<std::size_t> best;
  std::size_t best_missing = 0;
  auto consider = [&](std::size_t offset, std::size_t end) {
    if (end - offset < nbytes) return;
    const std::size_t lacking = bytes_missing({offset, offset + nbytes});
    if (best && lacking >= best_missing) return;
    best = offset;
    best_missing = lacking;
  };
  for (const auto& [offset, size] : ranges_.free()) {
    consider(offset, offset + size);
    const auto slot = first_over(offset);
    if (slot != slots_.end() && slot->first > offset && slot->first < offset + size)
      consider(slot->first, offset + size);
    if (best && best_missing == 0) break;
  }
  if (!best) raise(RA_OUT_OF_ADDRESSES, "no run of " + std::to_string(nbytes) + " bytes left in the reservation");
  return *best;
}

std::size_t Pool::take(std::size_t nbytes) {
  const std::size_t offset = place(nbytes);
  ranges_.take_at(offset, nbytes);
  try {
    Journal journal;
    back({offset, offset + nbytes}, true, journal);
    journal.commit();
  } catch (...) {
    give(offset, nbytes);
    throw;
  }
  return offset;
}

void Pool::create_slot(std::size_t offset, std::size_t nbytes, Journal& journal) {
  slots_.emplace(offset, Slot{Allocation(device, nbytes), nbytes});
  bytes_held_ += nbytes;
  bytes_peak_ = std::max(bytes_peak_, bytes_held_);
  journal.created(*this, offset);
}

// The size of the slot that begins at `gap`: larger than the gap where free addresses follow that nothing backs.
std::size_t Pool::with_spare(Range gap) const {
  const std::size_t wanted = std::min(slab_bytes, round_up(bytes_held_ / kSparePart, device.granularity));
  const Range around = ranges_.free_around(gap.end);
  const auto next = first_over(gap.end);
  const std::size_t end = std::min(around.empty() ? gap.end : around.end,
                                   next == slots_.end() ? reservation_.nbytes() : next->first);
  return std::max(gap.nbytes(), std::min(wanted, end - gap.begin));
}

void Pool::create(Range gap, bool spare, Journal& journal) {
  for (; gap.nbytes() > slab_bytes; gap.begin += slab_bytes) create_slot(gap.begin, slab_bytes, journal);
  const std::size_t larger = spare ? with_spare(gap) : gap.nbytes();
  try {
    return create_slot(gap.begin, larger, journal);
  } catch (const Error& error) {
    if (error.code != RA_OUT_OF_MEMORY || larger == gap.nbytes()) throw;
  }
  create_slot(gap.begin, gap.nbytes(), journal);
}

void Pool::map_slots(Range range, Journal& journal) {
  const auto first = slots_.find(first_over(range.begin)->first);
  std::size_t end = first->first;
  for (auto it = first; it != slots_.end() && it->first < range.end; ++it) {
    Slot& slot = it->second;
    end = it->first + slot.nbytes;
    if (slot.mapped) continue;
    RA_TRY(device.driver, MemMap, address(it->first), slot.nbytes, 0, slot.allocation.handle(), 0);
    slot.mapped = true;
    journal.mapped(*this, it->first);
  }
  // Also over slots that were mapped before: a failed rollback may have left one without access.
  const CUmemAccessDesc access{device.prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  RA_TRY(device.driver, MemSetAccess, address(first->first), end - first->first, &access, 1);
}

void Pool::back(Range range, bool spare, Journal& journal) {
  for (const Range& gap : missing(range)) create(gap, spare, journal);
  map_slots(range, journal);
}

CUresult Pool::unmap(Range run) noexcept {
  const CUresult result = device.driver.MemUnmap(address(run.begin), run.nbytes());
  if (result != CUDA_SUCCESS) return result;
  for (auto it = slots_.lower_bound(run.begin); it != slots_.end() && it->first < run.end; ++it)
    it->second.mapped = false;
  return result;
}

bool Pool::release(SlotMap::iterator slot) noexcept {
  slot->second.intact = false;
  if (slot->second.allocation.release() != CUDA_SUCCESS) return false;
  bytes_held_ -= slot->second.nbytes;
  slots_.erase(slot);
  return true;
}

std::size_t Pool::release_unmapped() noexcept {
  const std::size_t before = bytes_held_;
  for (auto it = slots_.begin(); it != slots_.end();) {
    const auto slot = it++;
    if (!slot->second.mapped) release(slot);
  }
  return before - bytes_held_;
}

std::size_t Pool::release_unused(bool asleep) noexcept {
  const std::size_t before = bytes_held_;
  for (auto it = slots_.begin(); it != slots_.end();) {
    const auto at = it++;
    const Slot& slot = at->second;
    const Range range{at->first, at->first + slot.nbytes};
    if (!ranges_.is_free(range) && (!asleep || slot.intact)) continue;
    if (slot.mapped && unmap(range) != CUDA_SUCCESS) continue;
    release(at);
  }
  return before - bytes_held_;
}

void Pool::mark_intact(Range run) noexcept {
  for (auto it = slots_.lower_bound(run.begin); it != slots_.end() && it->first < run.end; ++it)
    it->second.intact = true;
}

std::vector<Range> Pool::live() const { return ranges_.taken({0, reservation_.nbytes()}); }

std::vector<Range> Pool::mapped_runs() const {
  std::vector<Range> runs;
  for (const auto& [offset, slot] : slots_) {
    if (!slot.mapped) continue;
    if (!runs.empty() && runs.back().end == offset) {
      runs.back().end += slot.nbytes;
    } else {
      runs.push_back({offset, offset + slot.nbytes});
    }
  }
  return runs;
}

std::vector<Range> Pool::stale(Range range) const {
  std::vector<Range> found;
  std::size_t at = range.begin;
  auto add = [&](std::size_t end) {
    if (end > at) found.push_back({at, end});
  };
  for (auto it = first_over(at); it != slots_.end() && it->first < range.end; ++it) {
    if (!it->second.intact) continue;
    add(it->first);
    at = it->first + it->second.nbytes;
  }
  add(range.end);
  return found;
}

std::size_t Pool::bytes_mapped() const {
  std::size_t nbytes = 0;
  for (const auto& [offset, slot] : slots_) nbytes += slot.mapped ? slot.nbytes : 0;
  return nbytes;
}

std::size_t Pool::bytes_for_wake() const {
  std::size_t nbytes = 0;
  for (const Range& range : live()) nbytes += bytes_missing(range);
  return nbytes;
}

std::size_t Journal::bytes_created() const {
  std::size_t nbytes = 0;
  for (const Step& step : steps_)
    if (!step.is_map) nbytes += step.pool->slots_.at(step.offset).nbytes;
  return nbytes;
}

void Journal::undo() noexcept {
  for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
    Pool& pool = *step->pool;
    const auto slot = pool.slots_.find(step->offset);
    QuietContext scope(pool.device);
    if (step->is_map) {
      pool.unmap({step->offset, step->offset + slot->second.nbytes});
    } else if (!slot->second.mapped) {
      pool.release(slot);
    }
  }
  steps_.clear();
}

Scratch::Scratch(Pool& pool, std::size_t nbytes)
    : pool_(pool), nbytes_(round_up(nbytes, pool.device.granularity)), offset_(pool.take(nbytes_)) {}

Scratch::~Scratch() {
  QuietContext scope(pool_.device);
  pool_.give(offset_, nbytes_);
  pool_.release_unused(false);
  pool_.release_unused(false);  // once more for what was refused: it is cheap, and often enough
}

}  // namespace rotator
