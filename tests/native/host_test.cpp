#include "csrc/host.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "check.h"

using check::Child;
using check::error_of;
using check::folder;
using check::write_file;
using rotator::Device;
using rotator::Driver;
using rotator::HostArena;
using rotator::HostBlock;
using rotator::HostLimit;
using rotator::HostOptions;

static constexpr std::size_t kKiB = 1 << 10;
static constexpr std::size_t kMiB = 1 << 20;
static constexpr std::size_t kPage = 4 * kKiB;

// The simulated driver, and what its tests may ask it. The library is the one that ROTATOR_CUDA_DRIVER names.
class Machine {
 public:
  Machine() : driver(box_then_driver()), device(driver, 0), other(driver, 1) {}

  void set_faults(const char* rules) const { call<int(const char*)>("rotatorSimFaults")(rules); }
  uint64_t registered() const { return call<uint64_t()>("rotatorSimRegisteredBytes")(); }
  uint64_t calls(const char* name) const { return call<uint64_t(const char*)>("rotatorSimCalls")(name); }
  uint64_t registrations() const { return calls("cuMemHostRegister"); }

  const Driver driver;
  Device device, other;

 private:
  static Driver box_then_driver() {
    write_file("box/box.conf", "devices=2\nname=simulated\nmemory_bytes=68719476736\nscale=1024\n");
    CHECK(mkdir((folder() + "/box/control").c_str(), 0700) == 0);
    setenv("ROTATOR_SIM_BOX", (folder() + "/box").c_str(), 1);
    return rotator::load_driver(nullptr);
  }
  template <typename Function>
  static Function* call(const char* name) {
    void* library = dlopen(std::getenv("ROTATOR_CUDA_DRIVER"), RTLD_NOW | RTLD_LOCAL);
    CHECK(library != nullptr);
    return reinterpret_cast<Function*>(dlsym(library, name));
  }
};

static HostOptions options() {
  HostOptions chosen;
  chosen.prefault_threads = 4;
  chosen.extent_bytes = 256 * kKiB;
  return chosen;
}

static bool is_resident(const HostBlock& block) {
  const std::size_t skew = reinterpret_cast<std::uintptr_t>(block.data()) % kPage;
  std::vector<unsigned char> pages((block.nbytes + skew + kPage - 1) / kPage);
  CHECK(mincore(block.data() - skew, block.nbytes + skew, pages.data()) == 0);
  return std::all_of(pages.begin(), pages.end(), [](unsigned char page) { return (page & 1) != 0; });
}

TEST("host", "a reserve is one registration of just the bytes, prefaulted, and takes from it are contiguous") {
  const Machine machine;
  HostArena arena(options());
  const std::size_t sizes[] = {3 * kMiB + 5, 100, 70 * kKiB};
  std::size_t sum = 0;
  for (const std::size_t nbytes : sizes) sum += HostArena::block_bytes(nbytes);
  arena.reserve(machine.device, sum);
  CHECK(machine.registrations() == 1);
  CHECK(machine.registered() == arena.bytes_registered());
  CHECK(arena.bytes_registered() < sum + kPage);
  const unsigned char* next = nullptr;
  for (const std::size_t nbytes : sizes) {
    const auto block = arena.take(machine.device, nbytes);
    CHECK(block && is_resident(*block));
    CHECK(block->nbytes == HostArena::block_bytes(nbytes));
    CHECK(reinterpret_cast<std::uintptr_t>(block->data()) % 64 == 0);
    CHECK(next == nullptr || block->data() == next);
    next = block->data() + block->nbytes;
  }
  CHECK(arena.bytes_used() == sum);
  CHECK(!arena.take(machine.device, kPage));
}

TEST("host", "a reserve counts what is free already") {
  const Machine machine;
  HostArena arena(options());
  arena.reserve(machine.device, kMiB);
  arena.reserve(machine.device, kMiB);
  CHECK(arena.bytes_registered() == kMiB);
  arena.reserve(machine.device, kMiB + 8 * kPage);
  CHECK(arena.bytes_registered() == kMiB + 8 * kPage);
  CHECK(arena.take(machine.device, kMiB + 8 * kPage));
  CHECK(machine.registrations() == 2);
}

TEST("host", "a background grow goes in extents, and a block larger than one lies across them") {
  const Machine machine;
  HostArena arena(options());
  int steps = 1;
  while (!arena.grow(machine.device, kMiB)) ++steps;
  CHECK(steps == 4 && machine.registrations() == 4);
  const auto block = arena.take(machine.device, kMiB);
  CHECK(block && is_resident(*block));
  CHECK(arena.run_bytes(block->data() + 100, kMiB) == 256 * kKiB - 100);
  CHECK(arena.run_bytes(block->data() + kMiB - 5, 4) == 4);
}

TEST("host", "a copy by runs goes through where one over two registrations is refused") {
  const Machine machine;
  HostArena arena(options());
  while (!arena.grow(machine.device, kMiB)) continue;
  const HostBlock block = *arena.take(machine.device, kMiB);
  const rotator::ContextScope scope(machine.device);
  const rotator::Reservation reservation(machine.device, kMiB);
  rotator::Allocation allocation(machine.device, kMiB);
  RA_TRY(machine.driver, MemMap, reservation.address(), kMiB, 0, allocation.handle(), 0);
  const CUmemAccessDesc access{machine.device.prop.location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  RA_TRY(machine.driver, MemSetAccess, reservation.address(), kMiB, &access, 1);
  CHECK(machine.driver.MemcpyHtoDAsync(reservation.address(), block.data(), kMiB, machine.device.fill.get()) ==
        CUDA_ERROR_INVALID_VALUE);
  for (std::size_t i = 0; i < kMiB; ++i) block.data()[i] = static_cast<unsigned char>(i % 251);
  arena.each_run(block.data(), kMiB, [&](std::size_t at, std::size_t nbytes) {
    RA_TRY(machine.driver, MemcpyHtoDAsync, reservation.address() + at, block.data() + at, nbytes,
           machine.device.fill.get());
  });
  RA_TRY(machine.driver, StreamSynchronize, machine.device.fill.get());
  CHECK(std::memcmp(reinterpret_cast<void*>(reservation.address()), block.data(), kMiB) == 0);
  RA_TRY(machine.driver, MemUnmap, reservation.address(), kMiB);
}

TEST("host", "a block without room grows, and a given block is taken again") {
  const Machine machine;
  HostArena arena(options());
  const HostBlock first = arena.take_or_grow(machine.device, 10 * kPage);
  const HostBlock second = arena.take_or_grow(machine.device, 20 * kPage);
  arena.give(first);
  CHECK(arena.take_or_grow(machine.device, 10 * kPage).data() == first.data());
  CHECK(arena.bytes_registered() == 30 * kPage && arena.bytes_used() == 30 * kPage);
  arena.give(second);
}

TEST("host", "trim gives back extents that hold nothing, keeps what it is told to, and addresses are used again") {
  const Machine machine;
  HostArena arena(options());
  while (!arena.grow(machine.device, kMiB)) continue;
  const HostBlock low = *arena.take(machine.device, 10);
  CHECK(arena.trim(512 * kKiB) == 256 * kKiB);
  CHECK(arena.trim() == 512 * kKiB);
  CHECK(arena.bytes_registered() == 256 * kKiB && machine.registered() == 256 * kKiB);
  arena.reserve(machine.device, kMiB);
  CHECK(arena.take(machine.device, kMiB - 64)->data() == low.data() + low.nbytes);
  arena.give(low);
  CHECK(arena.trim() == 0);
}

TEST("host", "an extent that the driver will not let go of stays usable and is tried again") {
  const Machine machine;
  HostArena arena(options());
  arena.reserve(machine.device, kMiB);
  machine.set_faults("cuMemHostUnregister=999");
  CHECK(arena.trim() == 0);
  CHECK(arena.bytes_registered() == kMiB);
  const auto block = arena.take(machine.device, kMiB);
  CHECK(block);
  std::memset(block->data(), 1, kMiB);
  arena.give(*block);
  machine.set_faults("");
  CHECK(arena.trim() == kMiB && machine.registered() == 0);
}

TEST("host", "a registration that is refused changes nothing, and the next one succeeds") {
  const Machine machine;
  HostOptions chosen = options();
  chosen.shared_budget_path = write_file("budget", "rotator-host-budget 1 4194304\n");
  HostArena arena(chosen);
  machine.set_faults("cuMemHostRegister@1=999;cuMemHostRegister@2=2");
  const rotator::Error refused = error_of([&] { arena.reserve(machine.device, kMiB); });
  CHECK(refused.code == RA_DRIVER_ERROR && refused.driver_code == 999);
  const rotator::Error full = error_of([&] { arena.reserve(machine.device, kMiB); });
  CHECK(full.code == RA_HOST_MEMORY && full.driver_code == 2 && full.bytes_wanted == kMiB);
  CHECK(arena.bytes_registered() == 0 && arena.shared_budget()->bytes_used() == 0);
  arena.reserve(machine.device, kMiB);
  CHECK(arena.bytes_registered() == kMiB && arena.shared_budget()->bytes_used() == kMiB);
}

TEST("host", "a context that cannot be entered changes nothing either") {
  const Machine machine;
  HostArena arena(options());
  machine.set_faults("cuCtxPushCurrent@1=999");
  CHECK(error_of([&] { arena.reserve(machine.device, kMiB); }).code == RA_DRIVER_ERROR);
  CHECK(arena.bytes_registered() == 0 && machine.registered() == 0);
  arena.reserve(machine.device, kMiB);
}

TEST("host", "our own budget is named with the bytes wanted and left") {
  const Machine machine;
  HostOptions chosen = options();
  chosen.budget_bytes = 2 * kMiB;
  HostArena arena(chosen);
  arena.reserve(machine.device, kMiB + kPage);
  const rotator::Error error = error_of([&] { arena.reserve(machine.device, 3 * kMiB); });
  CHECK(error.code == RA_HOST_MEMORY);
  CHECK(error.bytes_wanted == 2 * kMiB - kPage && error.bytes_free == kMiB - kPage);
  CHECK(error.message.find("host_budget_bytes") != std::string::npos);
  CHECK(arena.usage().limit == HostLimit::kBudget && arena.usage().bytes_limit == 2 * kMiB);
  arena.reserve(machine.device, 2 * kMiB);
}

TEST("host", "arenas of two processes share a budget, and one that is killed leaves its part to the other") {
  const std::string path = write_file("budget", "rotator-host-budget 1 3145728\n");
  HostOptions chosen = options();
  chosen.shared_budget_path = path;
  Child child([&](Child& parent) {
    const Machine machine;
    HostArena theirs(chosen);
    theirs.reserve(machine.device, 2 * kMiB);
    parent.say();
    parent.listen();
  });
  child.listen();
  setenv("ROTATOR_SIM_BOX", (folder() + "/second").c_str(), 1);
  CHECK(rename((folder() + "/box").c_str(), (folder() + "/first").c_str()) == 0);
  const Machine machine;
  HostArena arena(chosen);
  const rotator::Error error = error_of([&] { arena.reserve(machine.device, 2 * kMiB); });
  CHECK(error.code == RA_HOST_MEMORY && error.bytes_free == kMiB);
  CHECK(error.message.find("shared") != std::string::npos);
  CHECK(arena.usage().bytes_shared_used == 2 * kMiB && arena.usage().limit == HostLimit::kSharedBudget);
  child.kill_hard();
  arena.reserve(machine.device, 2 * kMiB);
  CHECK(arena.shared_budget()->bytes_used() == 2 * kMiB);
  CHECK(arena.trim() == 2 * kMiB);
  CHECK(arena.shared_budget()->bytes_used() == 0);
}

TEST("host", "a control group's limit is named before the kernel kills for it") {
  const Machine machine;
  write_file("root/proc/self/mountinfo", "30 20 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
  write_file("root/proc/self/cgroup", "0::/\n");
  write_file("root/sys/fs/cgroup/memory.max", "10485760\n");
  write_file("root/sys/fs/cgroup/memory.current", "9437184\n");
  HostOptions chosen = options();
  chosen.limits_root = folder() + "/root";
  HostArena arena(chosen);
  arena.reserve(machine.device, kMiB);
  const rotator::Error error = error_of([&] { arena.reserve(machine.device, 3 * kMiB); });
  CHECK(error.code == RA_HOST_MEMORY && error.bytes_free == kMiB && error.bytes_wanted == 2 * kMiB);
  CHECK(error.message.find("control group") != std::string::npos);
}

TEST("host", "more than the machine has available is refused before it is touched") {
  const Machine machine;
  HostArena arena(options());
  const rotator::Error error = error_of([&] { arena.reserve(machine.device, std::size_t{1} << 46); });
  CHECK(error.code == RA_HOST_MEMORY && error.bytes_free != 0);
  CHECK(machine.registrations() == 0);
}

// A machine whose available memory is what `available_kib` says each time that its limits are read. Two pipes, because
// whoever writes the second knows that the first was read to its end.
class Oracle {
 public:
  Oracle(const std::string& root, std::function<std::string()> available_kib)
      : first_(write_file(root + "/proc/self/status", "")), second_(write_file(root + "/proc/meminfo", "")) {
    for (const char* path : {first_.c_str(), second_.c_str()}) CHECK(unlink(path) == 0 && mkfifo(path, 0600) == 0);
    thread_ = std::thread([this, available_kib] {
      for (;;) {
        close(open(first_.c_str(), O_WRONLY));
        if (stop_) return;
        const int fd = open(second_.c_str(), O_WRONLY);
        const std::string text = "MemTotal: 1048576 kB\nMemAvailable: " + available_kib() + " kB\n";
        stop_ = write(fd, text.data(), text.size()) < 0;
        close(fd);
      }
    });
  }
  ~Oracle() {
    stop_ = true;
    const int fd = open(first_.c_str(), O_RDONLY);
    thread_.join();
    close(fd);
  }

 private:
  const std::string first_, second_;
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

TEST("host", "memory that others take during the prefault ends it, and everything goes back") {
  const Machine machine;
  HostOptions chosen = options();
  chosen.prefault_threads = 1;
  chosen.limits_root = folder() + "/root";
  chosen.shared_budget_path = write_file("budget", "rotator-host-budget 1 1073741824\n");
  HostArena arena(chosen);
  rotator::SharedBudget watch(chosen.shared_budget_path);
  const Oracle memory("root", [&] { return watch.bytes_used() == 0 ? "524288" : "16384"; });
  const rotator::Error error = error_of([&] { arena.reserve(machine.device, 200 * kMiB); });
  CHECK(error.code == RA_HOST_MEMORY);
  CHECK(error.message.find("memory that is available") != std::string::npos);
  CHECK(arena.bytes_registered() == 0 && watch.bytes_used() == 0 && machine.registered() == 0);
}

static void drop_ipc_lock() {
  unsigned header[2] = {0x20080522, 0}, sets[6] = {};
  CHECK(syscall(SYS_capget, header, sets) == 0);
  sets[0] &= ~(1u << 14);
  CHECK(syscall(SYS_capset, header, sets) == 0);
  const rlimit limit{256 * kKiB, 256 * kKiB};
  CHECK(setrlimit(RLIMIT_MEMLOCK, &limit) == 0);
}

TEST("host", "a low memlock is no obstacle for a driver that does not count it") {
  drop_ipc_lock();
  const Machine machine;
  HostArena arena(options());
  arena.reserve(machine.device, 4 * kMiB);
  arena.reserve(machine.device, 8 * kMiB);
  CHECK(machine.registered() == 8 * kMiB);
  CHECK(machine.registrations() == 3);  // one to find out
}

TEST("host", "a driver that counts memlock is found out with little, and the limit is named") {
  drop_ipc_lock();
  const Machine machine;
  HostArena arena(options());
  arena.reserve(machine.device, 128 * kKiB);
  machine.set_faults("cuMemHostRegister@1=2");
  const rotator::Error error = error_of([&] { arena.reserve(machine.device, 4 * kMiB); });
  CHECK(error.code == RA_HOST_MEMORY && error.bytes_free == 128 * kKiB);
  CHECK(error.message.find("memlock") != std::string::npos);
  CHECK(arena.bytes_registered() == 128 * kKiB);
}

TEST("host", "a grow in the background does not queue behind a reserve, and others take and give during both") {
  const Machine machine;
  HostArena arena(options());
  const HostBlock block = arena.take_or_grow(machine.device, kMiB);
  machine.set_faults("cuMemHostRegister~300");
  std::thread foreground([&] { arena.reserve(machine.device, 2 * kMiB); });
  while (machine.registrations() != 2) std::this_thread::yield();
  CHECK(!arena.grow(machine.device, 4 * kMiB));
  arena.give(block);
  CHECK(arena.take(machine.device, kMiB)->data() == block.data());
  CHECK(arena.bytes_registered() == kMiB);
  foreground.join();
  CHECK(arena.bytes_registered() == 3 * kMiB);
}

TEST("host", "two reserves at once are served by one extent where one is enough") {
  const Machine machine;
  HostArena arena(options());
  machine.set_faults("cuMemHostRegister~50");
  std::thread one([&] { arena.reserve(machine.device, kMiB); }), two([&] { arena.reserve(machine.device, kMiB); });
  one.join();
  two.join();
  CHECK(arena.bytes_registered() == kMiB);
}

TEST("host", "a forked child has neither the extents nor a say over them") {
  const Machine machine;
  auto arena = std::make_unique<HostArena>(options());
  const HostBlock block = arena->take_or_grow(machine.device, kMiB);
  std::memset(block.data(), 7, kMiB);
  Child child([&](Child&) {
    unsigned char page = 0;
    CHECK(mincore(block.data(), kPage, &page) != 0);
    arena.reset();
    CHECK(machine.calls("cuMemHostUnregister") == 0);
  });
  CHECK(child.succeeds());
  CHECK(block.data()[kMiB - 1] == 7 && machine.registered() == kMiB);
}

// What a thread does with an arena that others use too: its blocks are its own.
static void churn(HostArena& arena, const Device& device, unsigned seed) {
  std::vector<HostBlock> held;
  for (int i = 0; i < 200; ++i) {
    seed = seed * 1664525 + 1013904223;
    const std::size_t nbytes = (seed >> 12) % (300 * kKiB) + 1;
    if (held.size() < 4) {
      held.push_back(arena.take_or_grow(device, nbytes));
      std::memset(held.back().data(), static_cast<int>(seed >> 24), held.back().nbytes);
      held.back().data()[0] = held.back().data()[held.back().nbytes - 1];
    } else {
      const HostBlock block = held[seed % held.size()];
      for (std::size_t at = 0; at < block.nbytes; at += 509) CHECK(block.data()[at] == block.data()[0]);
      held.erase(held.begin() + static_cast<long>(seed % held.size()));
      arena.give(block);
    }
    if (seed % 16 == 3) arena.trim();
    if (seed % 16 == 5) arena.grow(device, kMiB);
    if (seed % 16 == 7) CHECK(arena.usage().bytes_used <= arena.usage().bytes_limit);
  }
  for (const HostBlock& block : held) arena.give(block);
}

TEST("host", "threads that grow, take, give and trim at once never share a byte or lose one") {
  const Machine machine;
  HostOptions chosen = options();
  chosen.shared_budget_path = write_file("budget", "rotator-host-budget 1 1073741824\n");
  HostArena arena(chosen);
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < 4; ++i)
    threads.emplace_back([&, i] { churn(arena, i % 2 == 0 ? machine.device : machine.other, i); });
  for (auto& thread : threads) thread.join();
  CHECK(arena.bytes_used() == 0);
  arena.trim();
  CHECK(arena.bytes_registered() == 0 && machine.registered() == 0);
  CHECK(arena.shared_budget()->bytes_used() == 0);
}

TEST("host", "an arena that goes away gives everything back") {
  const Machine machine;
  {
    HostArena arena(options());
    arena.take_or_grow(machine.device, kMiB);
    arena.take_or_grow(machine.other, kMiB);
  }
  CHECK(machine.registered() == 0);
}
