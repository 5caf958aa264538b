#include "csrc/limits.h"

#include <sys/resource.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>
#include <vector>

#include "csrc/api.h"

namespace rotator {

static constexpr int kCapIpcLock = 14;
static constexpr uint64_t kReserveShare = 64;
static constexpr uint64_t kReserveMax = uint64_t{2} << 30;
// The first control groups say "no limit" with the largest multiple of a page that a long holds.
static constexpr uint64_t kNoLimitV1 = uint64_t{1} << 62;

void HostRoom::bound(uint64_t bytes_free, HostLimit by) {
  if (bytes_free >= bytes) return;
  bytes = bytes_free;
  limit = by;
}

static std::string text_of(const std::string& path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

static bool is_number(const std::string& text) { return !text.empty() && text[0] >= '0' && text[0] <= '9'; }

// A file that holds one number. `otherwise` for "max", and for what is not there.
static uint64_t number_in(const std::string& path, uint64_t otherwise) {
  const std::string text = text_of(path);
  return is_number(text) ? std::strtoull(text.c_str(), nullptr, 10) : otherwise;
}

// The number behind `key` in a file of lines like "key value" or "Key:   value kB".
static uint64_t field(const std::string& text, const std::string& key, int base, uint64_t otherwise) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind(key, 0) != 0) continue;
    return std::strtoull(line.c_str() + key.size(), nullptr, base);
  }
  return otherwise;
}

namespace {

struct Group {
  std::string path;
  uint64_t limit = kUnlimited;
  uint64_t current = 0;
  uint64_t reclaimable = 0;
  uint64_t room() const {
    if (limit == kUnlimited) return kUnlimited;
    const uint64_t held = current - std::min(current, reclaimable);
    return limit - std::min(limit, held);
  }
};

struct Hierarchy {
  int version = 0;
  std::string mount;  // where it is mounted
  std::string path;   // of this process's group below that
};

}  // namespace

static Group read_group(int version, const std::string& path) {
  Group group;
  group.path = path;
  const std::string stat = text_of(path + "/memory.stat");
  if (version == 2) {
    group.limit = std::min(number_in(path + "/memory.max", kUnlimited), number_in(path + "/memory.high", kUnlimited));
    group.current = number_in(path + "/memory.current", 0);
    group.reclaimable = field(stat, "inactive_file ", 10, 0) + field(stat, "active_file ", 10, 0);
    return group;
  }
  group.limit = number_in(path + "/memory.limit_in_bytes", kUnlimited);
  if (group.limit >= kNoLimitV1) group.limit = kUnlimited;
  group.current = number_in(path + "/memory.usage_in_bytes", 0);
  group.reclaimable = field(stat, "total_inactive_file ", 10, 0) + field(stat, "total_active_file ", 10, 0);
  return group;
}

static bool lists(const std::string& names, const std::string& name) {
  return ("," + names + ",").find("," + name + ",") != std::string::npos;
}

// "5:memory,cpu:/docker/x" of /proc/self/cgroup: the path of the group in this hierarchy.
static std::string own_path(const std::string& cgroups, int version) {
  std::istringstream lines(cgroups);
  for (std::string line; std::getline(lines, line);) {
    const auto first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (version == 2 ? controllers.empty() : lists(controllers, "memory")) return line.substr(second + 1);
  }
  return "/";
}

// A container may see its own group at the mount point while its path is still told from the host's root.
static std::string below(const std::string& path, const std::string& mount_root) {
  if (path.find("..") != std::string::npos) return "";
  if (mount_root != "/" && path.rfind(mount_root, 0) == 0) return path.substr(mount_root.size());
  return path == "/" ? "" : path;
}

static std::vector<Hierarchy> hierarchies(const std::string& root) {
  std::vector<Hierarchy> found;
  const std::string cgroups = text_of(root + "/proc/self/cgroup");
  std::istringstream mounts(text_of(root + "/proc/self/mountinfo"));
  for (std::string line; std::getline(mounts, line);) {
    const auto dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream head(line), tail(line.substr(dash + 3));
    std::string id, parent, device, mount_root, mount, type, source, options;
    head >> id >> parent >> device >> mount_root >> mount;
    tail >> type >> source >> options;
    const int version = type == "cgroup2" ? 2 : type == "cgroup" && lists(options, "memory") ? 1 : 0;
    if (version != 0) found.push_back({version, root + mount, below(own_path(cgroups, version), mount_root)});
  }
  return found;
}

// The group with the least room on the way from this process's own to the top: each of them bounds it.
static void read_groups(const std::string& root, HostLimits& limits) {
  uint64_t least = kUnlimited;
  for (const Hierarchy& hierarchy : hierarchies(root)) {
    std::string path = hierarchy.path;
    for (bool more = true; more;) {
      const Group group = read_group(hierarchy.version, hierarchy.mount + path);
      const bool first = limits.cgroup_version == 0 && group.current != 0;
      if (first || group.room() < least) {
        least = group.room();
        limits.cgroup_version = hierarchy.version;
        limits.cgroup_path = group.path;
        limits.cgroup_limit = group.limit;
        limits.cgroup_current = group.current;
        limits.cgroup_reclaimable = group.reclaimable;
      }
      more = !path.empty();
      path = path.substr(0, more ? path.rfind('/') : 0);
    }
  }
}

static void read_memlock(const std::string& root, HostLimits& limits) {
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0) {
    limits.memlock_soft = limit.rlim_cur == RLIM_INFINITY ? kUnlimited : limit.rlim_cur;
    limits.memlock_hard = limit.rlim_max == RLIM_INFINITY ? kUnlimited : limit.rlim_max;
  }
  const uint64_t capabilities = field(text_of(root + "/proc/self/status"), "CapEff:", 16, 0);
  limits.cap_ipc_lock = (capabilities >> kCapIpcLock & 1) != 0;
}

static void read_huge_pages(const std::string& root, HostLimits& limits) {
  const std::string folder = root + "/sys/kernel/mm/transparent_hugepage/";
  const std::string enabled = text_of(folder + "enabled");
  if (enabled.find("[never]") != std::string::npos) limits.huge_pages = 0;
  if (enabled.find("[madvise]") != std::string::npos) limits.huge_pages = 1;
  if (enabled.find("[always]") != std::string::npos) limits.huge_pages = 2;
  limits.huge_page_bytes = number_in(folder + "hpage_pmd_size", 0);
}

// Counts a list like "0-1,4".
static int count_listed(const std::string& list) {
  int count = 0;
  std::istringstream parts(list);
  for (std::string part; std::getline(parts, part, ',');) {
    if (!is_number(part)) continue;
    const auto dash = part.find('-');
    count += dash == std::string::npos ? 1 : std::atoi(part.c_str() + dash + 1) - std::atoi(part.c_str()) + 1;
  }
  return count;
}

uint64_t HostLimits::cgroup_room() const {
  return Group{cgroup_path, cgroup_limit, cgroup_current, cgroup_reclaimable}.room();
}

uint64_t HostLimits::memory_room() const {
  if (mem_available == kUnlimited) return kUnlimited;
  return mem_available - std::min({mem_available, mem_total / kReserveShare, kReserveMax});
}

HostRoom HostLimits::room() const {
  HostRoom room;
  room.bound(cgroup_room(), HostLimit::kCgroup);
  room.bound(memory_room(), HostLimit::kMemory);
  return room;
}

HostLimits host_limits(const std::string& root) {
  HostLimits limits;
  read_memlock(root, limits);
  read_groups(root, limits);
  read_huge_pages(root, limits);
  const std::string memory = text_of(root + "/proc/meminfo");
  limits.mem_total = field(memory, "MemTotal:", 10, 0) << 10;
  const uint64_t available_kib = field(memory, "MemAvailable:", 10, kUnlimited);
  if (available_kib != kUnlimited) limits.mem_available = available_kib << 10;
  limits.numa_nodes = std::max(1, count_listed(text_of(root + "/sys/devices/system/node/has_memory")));
  return limits;
}

const char* name_of(HostLimit limit) {
  switch (limit) {
    case HostLimit::kNone: return "no limit";
    case HostLimit::kBudget: return "the host budget";
    case HostLimit::kSharedBudget: return "the shared host budget";
    case HostLimit::kMemlock: return "memlock (ulimit -l)";
    case HostLimit::kCgroup: return "the control group's memory limit";
    case HostLimit::kMemory: return "the memory that is available";
    case HostLimit::kAddresses: return "the address space";
  }
  return "an unknown limit";
}

bool is_unified(const Driver& driver, CUdevice device) {
  int integrated = 0;
  return driver.DeviceGetAttribute(&integrated, CU_DEVICE_ATTRIBUTE_INTEGRATED, device) == CUDA_SUCCESS &&
         integrated != 0;
}

}  // namespace rotator

int ra_host_limits(ra_host_limits_t* out) {
  const rotator::HostLimits limits = rotator::host_limits();
  *out = {};
  out->memlock_soft = limits.memlock_soft;
  out->memlock_hard = limits.memlock_hard;
  out->cgroup_limit = limits.cgroup_limit;
  out->cgroup_current = limits.cgroup_current;
  out->cgroup_reclaimable = limits.cgroup_reclaimable;
  out->mem_total = limits.mem_total;
  out->mem_available = limits.mem_available;
  out->bytes_room = limits.room().bytes;
  out->huge_page_bytes = limits.huge_page_bytes;
  out->cap_ipc_lock = limits.cap_ipc_lock;
  out->cgroup_version = limits.cgroup_version;
  out->huge_pages = limits.huge_pages;
  out->numa_nodes = limits.numa_nodes;
  std::snprintf(out->cgroup_path, sizeof out->cgroup_path, "%s", limits.cgroup_path.c_str());
  return RA_OK;
}
