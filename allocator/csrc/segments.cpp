#include "csrc/segments.h"

#include <algorithm>
#include <string>

#include "csrc/error.h"

namespace rotator {

// Addresses cost nothing; room to spare keeps large segments placeable whatever was freed before.
static constexpr std::size_t kAddressFactor = 4;

Pool::Pool(Device& owner, int name, std::size_t slab)
    : device(owner),
      tag(name),
      slab_bytes(slab),
      reservation_(owner, round_up(owner.total_bytes * kAddressFactor, slab)),
      ranges_(reservation_.nbytes()) {}

Pool::~Pool() {
  QuietContext scope(device);
  for (std::size_t i = 0; i < slots.size(); ++i)
    if (slots[i].mapped) unmap(i, i + 1);
}

void Pool::use(std::size_t offset, std::size_t nbytes, bool add) {
  slots.resize(std::max(slots.size(), (offset + nbytes - 1) / slab_bytes + 1));
  for (std::size_t at = offset; at < offset + nbytes;) {
    const std::size_t slot = at / slab_bytes;
    const std::size_t end = std::min((slot + 1) * slab_bytes, offset + nbytes);
    slots[slot].bytes_used += add ? end - at : at - end;
    at = end;
  }
}

std::size_t Pool::take(std::size_t nbytes) {
  const auto offset = ranges_.take(nbytes);
  if (!offset) raise(RA_OUT_OF_ADDRESSES, "no run of " + std::to_string(nbytes) + " bytes left in the reservation");
  use(*offset, nbytes, true);
  try {
    Journal journal;
    back(*offset / slab_bytes, (*offset + nbytes - 1) / slab_bytes + 1, journal);
    journal.commit();
  } catch (...) {
    give(*offset, nbytes);
    throw;
  }
  return *offset;
}

void Pool::give(std::size_t offset, std::size_t nbytes) {
  use(offset, nbytes, false);
  ranges_.give(offset, nbytes);
}

void Pool::map(std::size_t index, Journal& journal) {
  Slot& slot = slots[index];
  if (!slot.allocation) {
    slot.allocation.emplace(device, slab_bytes);
    slot.intact = false;
    journal.created(*this, index);
  }
  RA_TRY(device.driver, MemMap, address(index * slab_bytes), slab_bytes, 0, slot.allocation->handle(), 0);
  slot.mapped = true;
  journal.mapped(*this, index);
}

void Pool::back(std::size_t first, std::size_t last, Journal& journal) {
  for (std::size_t i = first; i < last; ++i)
    if (!slots[i].mapped) map(i, journal);
  // Also over slots that were mapped before: a failed rollback may have left one without access.
  const CUmemAccessDesc access{device.prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  RA_TRY(device.driver, MemSetAccess, address(first * slab_bytes), (last - first) * slab_bytes, &access, 1);
}

CUresult Pool::unmap(std::size_t first, std::size_t last) {
  const CUresult result = device.driver.MemUnmap(address(first * slab_bytes), (last - first) * slab_bytes);
  if (result != CUDA_SUCCESS) return result;
  for (std::size_t i = first; i < last; ++i) slots[i].mapped = false;
  return result;
}

std::size_t Pool::release_unmapped() {
  std::size_t released = 0;
  for (Slot& slot : slots) {
    if (!slot.allocation || slot.mapped) continue;
    slot.intact = false;
    if (slot.allocation->release() != CUDA_SUCCESS) continue;
    slot.allocation.reset();
    released += slab_bytes;
  }
  return released;
}

std::size_t Pool::release_unused(bool asleep) {
  std::size_t released = 0;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    Slot& slot = slots[i];
    const bool unused = slot.bytes_used == 0 || (asleep && !slot.intact);
    if (!slot.allocation || !unused) continue;
    if (slot.mapped && unmap(i, i + 1) != CUDA_SUCCESS) continue;
    if (slot.allocation->release() != CUDA_SUCCESS) continue;
    slot.allocation.reset();
    slot.intact = false;
    released += slab_bytes;
  }
  return released;
}

std::size_t Pool::bytes_mapped() const {
  auto held = [](const Slot& slot) { return slot.allocation.has_value(); };
  return std::count_if(slots.begin(), slots.end(), held) * slab_bytes;
}

std::size_t Pool::bytes_for_wake() const {
  auto needed = [](const Slot& slot) { return slot.bytes_used != 0 && !slot.allocation; };
  return std::count_if(slots.begin(), slots.end(), needed) * slab_bytes;
}

bool Pool::intact(std::size_t offset, std::size_t nbytes) const {
  const auto first = slots.begin() + offset / slab_bytes;
  const auto last = slots.begin() + (offset + nbytes - 1) / slab_bytes + 1;
  return std::all_of(first, last, [](const Slot& slot) { return slot.intact; });
}

std::size_t Journal::bytes_created() const {
  std::size_t nbytes = 0;
  for (const Step& step : steps_)
    if (!step.is_map) nbytes += step.pool->slab_bytes;
  return nbytes;
}

void Journal::undo() noexcept {
  for (auto step = steps_.rbegin(); step != steps_.rend(); ++step) {
    Slot& slot = step->pool->slots[step->slot];
    QuietContext scope(step->pool->device);
    if (step->is_map) {
      step->pool->unmap(step->slot, step->slot + 1);
    } else if (!slot.mapped && slot.allocation->release() == CUDA_SUCCESS) {
      slot.allocation.reset();
    }
  }
  steps_.clear();
}

}  // namespace rotator
