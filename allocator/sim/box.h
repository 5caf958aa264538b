// A simulated box: devices that several processes share, described by `box.conf` in the directory ROTATOR_SIM_BOX.
//
// Two units. The driver's calls deal in real bytes, of which there are few: a device shown as 96 GiB at scale 4096
// really holds 24 MiB, granules and slabs shrink alike, and every byte it really holds has true content. What is shown
// to people (NVML, and the allocator's Python side) is real bytes times scale. Nothing in between knows of it.
//
// Bytes hang on a lock that dies with its process: each process has a row in the file `rows`, and holds a record lock
// on the byte of that row in the file `locks`. A row whose byte is unlocked is a dead process's and counts nothing.
#pragma once

#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

namespace sim {

constexpr int kDevicesMax = 16;
constexpr int kRowsMax = 512;

struct BoxConfig {
  int devices = 0;
  std::string name;
  uint64_t memory_bytes = 0;   // shown, one device
  uint64_t scale = 1;
  double copy_gib_s = 0;       // shown, one direction of one device's link; 0: as fast as the host copies
  double device_gib_s = 0;     // shown, copies and fills within a device; 0: as fast as the host's
  double clear_gib_s = 0;      // shown, the copy engine's clearing of memory that was given back; 0: at once
  bool integrated = false;     // device memory and pinned host memory come out of one pool
  uint64_t context_bytes = 0;  // shown, taken by each process that opens a device
  int capability_major = 12;
  int capability_minor = 0;
  std::array<std::string, kDevicesMax> uuids;
};

struct Row {
  std::atomic<int32_t> pid;
  std::atomic<uint64_t> bytes[kDevicesMax];  // real; written by its owner alone
};

struct ProcessBytes {
  pid_t pid;
  uint64_t bytes;
};

class Box {
 public:
  // The box that ROTATOR_SIM_BOX names, or null when it names none or names nonsense.
  static Box* open();

  const BoxConfig& config() const { return config_; }
  uint64_t device_bytes() const { return config_.memory_bytes / config_.scale; }

  // False when the device has no room. Checked and taken under the box's lock.
  bool take(int device, uint64_t nbytes);
  void give(int device, uint64_t nbytes);
  std::vector<ProcessBytes> processes(int device) const;
  uint64_t bytes_used(int device) const;

  // First line of `control/<name>`, or an empty string: how a person or a test reaches into a running box.
  std::string control(const std::string& name) const;
  std::string control_for_device(int device, const char* what) const;

 private:
  explicit Box(std::string path);
  Row& own_row();
  bool alive(int row) const;

  std::string path_;
  BoxConfig config_;
  Row* rows_ = nullptr;
  int locks_fd_ = -1;
  int own_ = -1;
};

// The devices that a CUDA_VISIBLE_DEVICES-like variable leaves, by index or UUID, in its order.
std::vector<int> visible_devices(const BoxConfig& config, const char* variable);

}  // namespace sim
