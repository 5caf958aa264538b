// Several threads on one allocator over the simulated driver, built with ThreadSanitizer (which does not survive inside
// Python). Run by `make tsan`: tsan_allocator <libraries' folder> <empty folder> <rounds>. Exits with 1 when content is
// not as written, and with ThreadSanitizer's own code when it saw a race.
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "csrc/api.h"

namespace {

constexpr std::size_t kSegmentBytes = 6 * 4096;
constexpr uint32_t kAllTags = (1u << RA_TAGS) - 1;
constexpr uint32_t kOffload = 1u << RA_WEIGHTS | 1u << RA_RUNTIME | 1u << RA_CUDAGRAPH;

std::atomic<bool> stopping{false};
std::atomic<int> wrong{0};

void expect(bool holds, const char* what, const ra_error& error) {
  if (holds) return;
  std::fprintf(stderr, "tsan_allocator: %s (%d, %s)\n", what, error.code, error.message);
  ++wrong;
}

// What others may bring about at any time is no failure of the thread that meets it.
bool refused(int code) { return code == RA_TAG_ASLEEP; }
// A pinned neighbour keeps everybody awake.
bool in_turn(int code) {
  return code == RA_OK || code == RA_REGISTERED || code == RA_ALREADY_ASLEEP || code == RA_NOT_ASLEEP;
}

void write_box(const std::string& folder) {
  std::ofstream box(folder + "/box.conf");
  box << "devices=2\nname=simulated\nmemory_bytes=1073741824\nscale=64\ncopy_gib_s=200\ndevice_gib_s=2000\n"
      << "uuid.0=GPU-0\nuuid.1=GPU-1\n";
}

struct Owned {
  uint64_t address;
  unsigned char value;
};

// Allocates, writes, reads back and frees under one tag, for as long as the others cycle.
void use(ra_allocator* allocator, int tag, int device, int rounds) {
  std::vector<Owned> owned;
  std::vector<unsigned char> block(kSegmentBytes), found(kSegmentBytes);
  for (int round = 0; round < rounds; ++round) {
    ra_error error{};
    Owned fresh{0, static_cast<unsigned char>(round + 1)};
    if (ra_alloc(allocator, kSegmentBytes, device, tag, &fresh.address, &error) == RA_OK) {
      std::memset(block.data(), fresh.value, block.size());
      // Asleep between the two: its content stays open, so it goes at once.
      const int code = ra_write(allocator, fresh.address, 0, block.data(), block.size(), &error);
      expect(code == RA_OK || refused(code), "write", error);
      if (code == RA_OK) owned.push_back(fresh);
      else ra_free(allocator, fresh.address, nullptr, nullptr);
    } else {
      expect(refused(error.code), "alloc", error);
    }
    for (const Owned& mine : owned) {
      const int code = ra_read(allocator, mine.address, 0, found.data(), found.size(), &error);
      expect(code == RA_OK || refused(code), "read", error);
      if (code != RA_OK) continue;
      const bool even = std::memcmp(found.data(), found.data() + 1, found.size() - 1) == 0;
      expect(even && found.front() == mine.value, "content", error);
    }
    if (owned.size() <= 3) continue;
    expect(ra_free(allocator, owned.front().address, nullptr, &error) == RA_OK, "free", error);
    owned.erase(owned.begin());
  }
  for (const Owned& mine : owned) ra_free(allocator, mine.address, nullptr, nullptr);
}

// Whole sleeps, and partial ones that go deeper.
void cycle(ra_allocator* allocator) {
  for (unsigned turn = 0; !stopping; ++turn) {
    ra_error error{};
    const uint64_t wanted = turn % 3 == 0 ? 0 : turn % 3 * kSegmentBytes;
    for (int depth = 0; depth < 2; ++depth)
      expect(in_turn(ra_sleep(allocator, kAllTags, kOffload, 0, wanted, nullptr, &error)), "sleep", error);
    expect(in_turn(ra_wake(allocator, kAllTags, 0, nullptr, &error)), "wake", error);
  }
}

void prepare(ra_allocator* allocator) {
  while (!stopping) {
    ra_error error{};
    expect(ra_prepare(allocator, kOffload, nullptr, &error) == RA_OK, "prepare", error);
    uint64_t nbytes = 0;
    expect(ra_release_masters(allocator, kAllTags, &nbytes, &error) == RA_OK, "release", error);
  }
}

// Lets some of them come to their end and starts again over others.
void prepare_in_background(ra_allocator* allocator) {
  for (unsigned turn = 0; !stopping; ++turn) {
    ra_error error{};
    expect(ra_prepare_start(allocator, kOffload, &error) == RA_OK, "start", error);
    ra_prepare_state state{};
    for (unsigned looks = 0; looks < turn % 50 && !stopping; ++looks) {
      ra_prepare_status(allocator, &state);
      std::this_thread::yield();
    }
    expect(state.running != 0 || state.code == RA_OK, state.message, error);
  }
}

// Registers a segment of its own now and then, which keeps its tag awake for that long.
void pin(ra_allocator* allocator) {
  for (unsigned turn = 0; !stopping; ++turn) {
    ra_error error{};
    uint64_t address = 0;
    if (ra_alloc(allocator, kSegmentBytes, 0, RA_WORKSPACE, &address, &error) != RA_OK) continue;
    if (ra_pin(allocator, address, &error) == RA_OK) {
      if (turn % 2 == 0) ra_free(allocator, address, nullptr, nullptr);
      expect(ra_unpin(allocator, address, &error) == RA_OK, "unpin", error);
      if (turn % 2 == 0) continue;
    }
    ra_free(allocator, address, nullptr, nullptr);
  }
}

void watch(ra_allocator* allocator) {
  while (!stopping) {
    ra_error error{};
    ra_usage rows[32];
    ra_host_usage host{};
    std::size_t count = 0;
    uint32_t tags = 0;
    uint64_t nbytes = 0, total = 0;
    ra_memory_usage(allocator, rows, 32, &count);
    ra_host_memory(allocator, &host);
    ra_asleep_tags(allocator, &tags);
    expect(ra_device_memory(allocator, 0, &nbytes, &total, &error) == RA_OK, "device memory", error);
    expect(ra_collect(allocator, &nbytes, &error) == RA_OK, "collect", error);
  }
}

int run(const std::string& driver, int rounds) {
  ra_error error{};
  ra_config config{};
  config.slab_bytes = 16 * 4096;
  config.chunk_bytes = 2 * 4096;
  config.prefault_threads = 2;
  config.use_digest = 1;
  config.link_share_permille = 1000;
  ra_allocator* allocator = nullptr;
  if (ra_open(driver.c_str(), &config, &allocator, &error) != RA_OK) {
    std::fprintf(stderr, "tsan_allocator: %s\n", error.message);
    return 2;
  }
  std::vector<std::thread> users, others;
  for (int i = 0; i < 4; ++i) users.emplace_back(use, allocator, i % 2 == 0 ? RA_WEIGHTS : RA_RUNTIME, i / 2, rounds);
  for (auto* body : {cycle, prepare, prepare_in_background, pin, watch}) others.emplace_back(body, allocator);
  for (auto& user : users) user.join();
  stopping = true;
  for (auto& other : others) other.join();
  return ra_close(allocator, &error) == RA_OK && wrong == 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  write_box(argv[2]);
  setenv("ROTATOR_SIM_BOX", argv[2], 1);
  const int code = run(std::string(argv[1]) + "/librotator_simdriver.so", std::atoi(argv[3]));
  std::printf("tsan_allocator: %s\n", code == 0 ? "content as written, no thread refused" : "failed");
  return code;
}
