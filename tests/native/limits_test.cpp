#include "check.h"
#include "csrc/limits.h"

using check::folder;
using check::write_file;
using rotator::host_limits;
using rotator::HostLimit;
using rotator::HostLimits;
using rotator::kUnlimited;

static constexpr uint64_t kMiB = 1 << 20;

static void mount(const std::string& line) { write_file("proc/self/mountinfo", line); }
static const char* const kMountV2 = "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";

static void group(const std::string& path, uint64_t max, uint64_t current, uint64_t cache) {
  const std::string below = "sys/fs/cgroup" + path;
  write_file(below + "/memory.max", max == 0 ? "max\n" : std::to_string(max * kMiB) + "\n");
  write_file(below + "/memory.high", "max\n");
  write_file(below + "/memory.current", std::to_string(current * kMiB) + "\n");
  write_file(below + "/memory.stat", "anon 1\ninactive_file " + std::to_string(cache * kMiB) + "\nactive_file 0\n");
}

TEST("limits", "what cannot be read bounds nothing") {
  const HostLimits limits = host_limits(folder());
  CHECK(limits.cgroup_version == 0);
  CHECK(limits.room().bytes == kUnlimited);
  CHECK(limits.room().limit == HostLimit::kNone);
}

TEST("limits", "of the control groups on the way up the one with the least room counts") {
  mount(kMountV2);
  write_file("proc/self/cgroup", "0::/outer/inner\n");
  group("/outer", 1000, 900, 0);
  group("/outer/inner", 2000, 900, 0);
  const HostLimits limits = host_limits(folder());
  CHECK(limits.cgroup_version == 2);
  CHECK(limits.cgroup_room() == 100 * kMiB);
  CHECK(limits.cgroup_path == folder() + "/sys/fs/cgroup/outer");
  CHECK(limits.room().limit == HostLimit::kCgroup);
}

TEST("limits", "page cache inside a control group gives way") {
  mount(kMountV2);
  write_file("proc/self/cgroup", "0::/\n");
  group("", 1000, 900, 300);
  CHECK(host_limits(folder()).cgroup_room() == 400 * kMiB);
}

TEST("limits", "a group's high limit bounds before its hard one") {
  mount(kMountV2);
  write_file("proc/self/cgroup", "0::/\n");
  group("", 1000, 100, 0);
  write_file("sys/fs/cgroup/memory.high", std::to_string(300 * kMiB) + "\n");
  CHECK(host_limits(folder()).cgroup_room() == 200 * kMiB);
}

TEST("limits", "a group without a limit has all the room there is") {
  mount(kMountV2);
  write_file("proc/self/cgroup", "0::/\n");
  group("", 0, 900, 0);
  const HostLimits limits = host_limits(folder());
  CHECK(limits.cgroup_version == 2);
  CHECK(limits.cgroup_room() == kUnlimited);
}

TEST("limits", "the first version's groups are read, also where a container sees its own as the root") {
  mount("40 20 0:30 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n");
  write_file("proc/self/cgroup", "7:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n0::/\n");
  const std::string below = "sys/fs/cgroup/memory";
  write_file(below + "/memory.limit_in_bytes", std::to_string(500 * kMiB) + "\n");
  write_file(below + "/memory.usage_in_bytes", std::to_string(450 * kMiB) + "\n");
  write_file(below + "/memory.stat", "total_inactive_file " + std::to_string(50 * kMiB) + "\ntotal_active_file 0\n");
  const HostLimits limits = host_limits(folder());
  CHECK(limits.cgroup_version == 1);
  CHECK(limits.cgroup_room() == 100 * kMiB);
  write_file(below + "/memory.limit_in_bytes", "9223372036854771712\n");
  CHECK(host_limits(folder()).cgroup_room() == kUnlimited);
}

TEST("limits", "of the memory that is available a reserve is left to everybody else") {
  write_file("proc/meminfo", "MemTotal:       65536000 kB\nMemFree: 1 kB\nMemAvailable:   10240000 kB\n");
  const HostLimits limits = host_limits(folder());
  CHECK(limits.mem_available == uint64_t{10240000} << 10);
  CHECK(limits.memory_room() == (uint64_t{10240000} - 65536000 / 64) << 10);
  CHECK(limits.room().limit == HostLimit::kMemory);
}

TEST("limits", "huge pages, nodes with memory and the capability are reported") {
  write_file("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n");
  write_file("sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "2097152\n");
  write_file("sys/devices/system/node/has_memory", "0-1,4\n");
  write_file("proc/self/status", "Name:\tx\nCapEff:\t0000000000004000\n");
  const HostLimits limits = host_limits(folder());
  CHECK(limits.huge_pages == 1);
  CHECK(limits.huge_page_bytes == 2 * kMiB);
  CHECK(limits.numa_nodes == 3);
  CHECK(limits.cap_ipc_lock);
}

TEST("limits", "the C function tells the same as the machine") {
  ra_host_limits_t told{};
  CHECK(ra_host_limits(&told) == RA_OK);
  CHECK(told.mem_total != 0 && told.mem_available != 0 && told.mem_available <= told.mem_total);
  CHECK(told.numa_nodes >= 1);
  CHECK(told.bytes_room <= told.mem_available);
  CHECK(told.memlock_soft <= told.memlock_hard);
}
