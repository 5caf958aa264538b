// Wake: create, map, give access, copy back; every step in a journal, nothing marked awake before all copies ended.
#include <algorithm>
#include <list>

#include "csrc/clock.h"
#include "csrc/error.h"
#include "csrc/restore.h"
#include "csrc/state.h"

namespace rotator {

// So many slabs are mapped between looks at the copies, which must not run dry meanwhile.
static constexpr std::size_t kSlabsPerStep = 4;

// Content for what `range` of the pool lacks.
static void fill(const Segments& segments, const Pool& pool, Range range, Restore& restore) {
  for (const Range& stale : pool.stale(range)) {
    auto it = segments.upper_bound(pool.address(stale.begin));
    if (it != segments.begin() && std::prev(it)->second.pool == &pool) --it;
    for (; it != segments.end() && it->first < pool.address(stale.end); ++it) {
      const bool touched = !intersection(it->second.range(), stale).empty();
      if (it->second.pool == &pool && touched) restore.add(it->second, stale);
    }
  }
  restore.pump();
}

// Pools come in tag order, weights first, so their copies run while the other tags are being mapped.
void State::restore(const std::vector<Pool*>& pools, Journal& journal, ra_report& report) {
  std::list<Restore> restores;
  std::map<Device*, Restore*> by_device;
  for (Pool* pool : pools) {
    ContextScope scope(pool->device);
    Restore*& restore = by_device[&pool->device];
    if (restore == nullptr) restore = &restores.emplace_back(pool->device, masters_, report);
    const std::size_t step = kSlabsPerStep * pool->slab_bytes;
    for (Range live : pool->live()) {
      for (; !live.empty(); live.begin += step) {
        const Range part{live.begin, std::min(live.end, live.begin + step)};
        const Stopwatch mapping;
        pool->back(part, false, journal);
        report.map_seconds += mapping.seconds();
        fill(segments_, *pool, part, *restore);
      }
    }
  }
  for (auto& [on, restore] : by_device) {
    ContextScope scope(*on);
    restore->finish();
    on->finish();
  }
  report.bytes_device = journal.bytes_created();
}

static uint64_t bytes_wanted_on(const std::vector<Pool*>& pools, const Device& device) {
  uint64_t wanted = 0;
  for (const Pool* pool : pools)
    if (&pool->device == &device) wanted += pool->bytes_for_wake();
  return wanted;
}

// The first device that cannot hold what its tags want, in the words of someone who has to make room.
static void explain(Error& error, const std::vector<Pool*>& pools) {
  for (const Pool* pool : pools) {
    error.bytes_wanted = bytes_wanted_on(pools, pool->device);
    error.bytes_free = pool->device.bytes_free();
    if (error.bytes_wanted > error.bytes_free) return;
  }
}

void State::wake(uint32_t tags, bool strict, ra_report& report) {
  if ((tags & ~kAllTags) != 0 || tags == 0) raise(RA_UNKNOWN_TAG, "unknown tag, or no tag at all");
  const uint32_t asleep_now = tags & asleep_;
  if (asleep_now == 0 || (strict && asleep_now != tags)) raise(RA_NOT_ASLEEP, "a tag named is not asleep: there is nothing to wake");
  if (capturing()) raise(RA_CAPTURING, "a graph capture is running: end it first");
  const Stopwatch watch;
  const std::vector<Pool*> pools = pools_of(asleep_now);
  Journal journal;
  try {
    restore(pools, journal, report);
  } catch (Error& error) {
    // Copies in flight must end before their pages go.
    for (const Pool* pool : pools) pool->device.settle();
    journal.undo();
    if (error.code == RA_OUT_OF_MEMORY) explain(error, pools);
    throw;
  }
  journal.commit();
  asleep_ &= ~asleep_now;
  tell_releasable();
  report.copy_seconds = watch.seconds() - report.map_seconds;
  report.seconds = watch.seconds();
}

}  // namespace rotator
