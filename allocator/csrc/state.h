// All that one allocator knows. Not locked: plugin.cpp holds one mutex around every call.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "csrc/fence.h"
#include "csrc/host.h"
#include "csrc/segments.h"

namespace rotator {

constexpr uint32_t kAllTags = (1u << RA_TAGS) - 1;
constexpr uint32_t bit(int tag) { return 1u << tag; }

class State {
 public:
  State(Driver driver, const ra_config& config);
  ~State();

  CUdeviceptr alloc(std::size_t nbytes, int device, int tag);
  void free(CUdeviceptr address, CUstream stream);
  void write(CUdeviceptr address, std::size_t offset, const void* data, std::size_t nbytes);
  void read(CUdeviceptr address, std::size_t offset, void* data, std::size_t nbytes);

  void sleep(uint32_t tags, uint32_t offload, bool strict, ra_report& report);
  void wake(uint32_t tags, bool strict, ra_report& report);
  void prepare(uint32_t tags, ra_report& report);
  uint64_t release_masters(uint32_t tags);
  uint64_t collect();
  void capture(bool begin);

  std::vector<ra_usage> usage() const;
  ra_host_usage host_usage() const;
  void device_memory(int index, uint64_t& free, uint64_t& total);
  uint32_t asleep_tags() const { return asleep_; }

 private:
  struct Copy {
    Segment* segment;
    bool fresh;  // the block was taken for this copy
  };

  Device& device(int index);
  Pool& pool(int tag, int index);
  std::vector<Pool*> pools_of(uint32_t tags);
  Segment& find(CUdeviceptr address);
  Segment& accessible(CUdeviceptr address, std::size_t offset, std::size_t nbytes);
  bool asleep(const Pool& pool) const { return (asleep_ & bit(pool.tag)) != 0; }
  bool is_capturing(CUstream stream) const;
  bool capturing();
  void drop_master(Segment& segment);
  uint64_t release_unused();
  std::size_t take_range(Pool& target, std::size_t size);

  // masters.cpp
  void quiesce(uint32_t tags);
  void take_masters(uint32_t tags, ra_report& report);
  std::vector<Copy> plan_copies(uint32_t tags, ra_report& report);
  void reserve_blocks(std::vector<Copy>& copies);
  void run_copies(const std::vector<Copy>& copies, ra_report& report);
  bool unchanged(const Segment& segment) const;

  // sleep.cpp
  void unmap_all(const std::vector<Pool*>& pools);
  void release_all(const std::vector<Pool*>& pools, ra_report& report);

  // wake.cpp
  void restore(const std::vector<Pool*>& pools, Journal& journal, ra_report& report);
  void restore_segment(Segment& segment, ra_report& report);
  void synchronize(const std::vector<Pool*>& pools);

  const Driver driver_;
  const ra_config config_;
  uint32_t asleep_ = 0;
  unsigned captures_ = 0;                  // brackets told by the caller
  std::set<CUstream> capturing_streams_;   // met in a free
  // Destroyed bottom up: fences and masters need pools, pools need their device.
  std::map<int, std::unique_ptr<Device>> devices_;
  std::map<std::pair<int, int>, std::unique_ptr<Pool>> pools_;  // by tag and device
  HostArena arena_;
  Segments segments_;
  FreeQueue freed_;
};

}  // namespace rotator
