#include "csrc/spill.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <memory>
#include <thread>

#include "check.h"

using check::Child;
using check::error_of;
using check::folder;
using rotator::digest_of;
using rotator::SpillOptions;
using rotator::SpillSlot;
using rotator::SpillStore;

static constexpr std::size_t kChunk = 64 << 10;

static SpillOptions options() {
  SpillOptions chosen;
  chosen.directory = folder();
  chosen.threads = 3;
  chosen.chunk_bytes = kChunk;
  return chosen;
}

// Content that differs by seed and by position, at an address that is `skew` beyond a page.
class Content {
 public:
  explicit Content(std::size_t nbytes, unsigned seed = 1, std::size_t skew = 0) : nbytes_(nbytes) {
    room_.reset(static_cast<unsigned char*>(std::aligned_alloc(4096, (nbytes + skew + 8191) / 4096 * 4096)), std::free);
    data_ = room_.get() + skew;
    for (std::size_t i = 0; i < nbytes; ++i)
      data_[i] = static_cast<unsigned char>((seed * 37 + i * 11 + i / 251) % 253);
  }
  unsigned char* data() const { return data_; }
  std::size_t size() const { return nbytes_; }
  void clear() const { std::memset(data_, 0xee, nbytes_); }
  bool operator==(const Content& other) const {
    return nbytes_ == other.nbytes_ && std::memcmp(data_, other.data_, nbytes_) == 0;
  }

 private:
  std::shared_ptr<unsigned char> room_;
  unsigned char* data_ = nullptr;
  std::size_t nbytes_;
};

static SpillSlot put(SpillStore& store, const Content& content) {
  return store.write(content.data(), content.size(), digest_of(content.data(), content.size()));
}

// The disk's bytes of the nameless file, found as this process has it open.
static uint64_t bytes_on_disk() {
  uint64_t nbytes = 0;
  DIR* open = opendir("/proc/self/fd");
  CHECK(open != nullptr);
  while (const dirent* entry = readdir(open)) {
    char target[512] = {};
    const std::string link = std::string("/proc/self/fd/") + entry->d_name;
    if (readlink(link.c_str(), target, sizeof target - 1) <= 0) continue;
    struct stat found {};
    if (std::strncmp(target, folder().c_str(), folder().size()) == 0 && stat(link.c_str(), &found) == 0)
      nbytes += static_cast<uint64_t>(found.st_blocks) * 512;
  }
  closedir(open);
  return nbytes;
}

TEST("spill", "what is written reads back, whatever its size and wherever its memory lies") {
  SpillStore store(options());
  const std::size_t sizes[] = {0, 1, 4095, 4096, 4097, kChunk - 1, kChunk, kChunk + 1, 7 * kChunk + 123};
  for (const std::size_t nbytes : sizes)
    for (const std::size_t skew : {0, 64}) {
      const Content written(nbytes, static_cast<unsigned>(nbytes), skew), read(nbytes, 0, 64 - skew);
      const SpillSlot slot = put(store, written);
      read.clear();
      store.read(slot, read.data(), nbytes);
      CHECK(read == written);
      store.give(slot);
    }
  CHECK(store.bytes_used() == 0);
}

TEST("spill", "many transfers are under way at once, from several threads") {
  SpillStore store(options());
  const auto work = [&](unsigned seed) {
    for (unsigned round = 0; round < 6; ++round) {
      std::vector<Content> contents;
      std::vector<SpillStore::Ticket> tickets;
      std::vector<SpillSlot> slots;
      for (unsigned i = 0; i < 5; ++i) contents.emplace_back(kChunk * i + seed * 100 + i, seed + i, 64 * (i % 2));
      for (const Content& content : contents)
        tickets.push_back(store.start_write(content.data(), content.size(), digest_of(content.data(), content.size())));
      for (const auto& ticket : tickets) slots.push_back(store.wait(ticket));
      tickets.clear();
      std::vector<Content> read;
      for (const SpillSlot& slot : slots) read.emplace_back(slot.nbytes, 0u);
      for (std::size_t i = 0; i < slots.size(); ++i) tickets.push_back(store.start_read(slots[i], read[i].data()));
      for (const auto& ticket : tickets) store.wait(ticket);
      for (std::size_t i = 0; i < slots.size(); ++i) CHECK(read[i] == contents[i]);
      for (const SpillSlot& slot : slots) store.give(slot);
    }
  };
  std::thread one(work, 1), two(work, 2);
  work(3);
  one.join();
  two.join();
  CHECK(store.bytes_used() == 0);
}

TEST("spill", "a slot given back is used again, and its bytes go back to the disk") {
  SpillStore store(options());
  const Content content(16 * kChunk);
  const SpillSlot first = put(store, content), second = put(store, content);
  CHECK(store.bytes_used() == 32 * kChunk);
  CHECK(bytes_on_disk() >= 32 * kChunk);
  store.give(first);
  CHECK(bytes_on_disk() < 20 * kChunk);
  CHECK(put(store, content).offset == first.offset);
  const Content read(16 * kChunk, 9);
  store.read(second, read.data(), read.size());
  CHECK(read == content);
}

TEST("spill", "nothing has a name in the directory, so nothing is left by whoever is killed") {
  Child child([&](Child& parent) {
    SpillStore store(options());
    put(store, Content(8 * kChunk));
    parent.say();
    parent.listen();
  });
  child.listen();
  int names = 0;
  DIR* open = opendir(folder().c_str());
  while (const dirent* entry = readdir(open)) names += entry->d_name[0] != '.';
  closedir(open);
  CHECK(names == 0);
}

static std::atomic<long> flip_at{-1};

static ssize_t flipping_read(int fd, void* data, std::size_t nbytes, off_t offset) {
  const ssize_t got = pread(fd, data, nbytes, offset);
  const long at = flip_at - static_cast<long>(offset);
  if (at >= 0 && at < got) static_cast<unsigned char*>(data)[at] ^= 4;
  return got;
}

TEST("spill", "one bit that changed on the disk is a lost master") {
  SpillOptions chosen = options();
  chosen.calls.read = flipping_read;
  SpillStore store(chosen);
  const Content content(3 * kChunk + 77);
  const SpillSlot slot = put(store, content);
  const Content read(content.size(), 0);
  for (const std::size_t at : {std::size_t{0}, kChunk + 5, 3 * kChunk + 76}) {
    flip_at = static_cast<long>(slot.offset + at);
    const rotator::Error error = error_of([&] { store.read(slot, read.data(), read.size()); });
    CHECK(error.code == RA_MASTER_LOST);
    CHECK(error.message.find("does not read back as it was written") != std::string::npos);
  }
  flip_at = -1;
  store.read(slot, read.data(), read.size());
  CHECK(read == content);
}

TEST("spill", "content that was not what its digest says is a lost master") {
  SpillStore store(options());
  const Content content(kChunk), other(kChunk, 2);
  const SpillSlot slot = store.write(content.data(), content.size(), digest_of(other.data(), other.size()));
  CHECK(error_of([&] { store.read(slot, other.data(), other.size()); }).code == RA_MASTER_LOST);
}

TEST("spill", "a file that ends too early, or a disk that cannot be read, is a lost master") {
  SpillOptions chosen = options();
  static std::atomic<int> answer{1};
  chosen.calls.read = [](int fd, void* data, std::size_t nbytes, off_t offset) -> ssize_t {
    if (answer == 1) return pread(fd, data, nbytes, offset);
    errno = EIO;
    return answer;
  };
  SpillStore store(chosen);
  const Content content(kChunk);
  const SpillSlot slot = put(store, content);
  for (const int wrong : {0, -1}) {
    answer = wrong;
    CHECK(error_of([&] { store.read(slot, content.data(), content.size()); }).code == RA_MASTER_LOST);
  }
}

static std::atomic<unsigned> turns{0};

static ssize_t halting(ssize_t (*move)(int, void*, std::size_t, off_t), int fd, void* data, std::size_t nbytes,
                       off_t offset) {
  const unsigned turn = turns++;
  if (turn % 3 == 0) {
    errno = EINTR;
    return -1;
  }
  // Now by whole blocks, now not.
  if (turn % 3 == 1 && nbytes > 8192) return move(fd, data, 4096, offset);
  const ssize_t moved = move(fd, data, nbytes, offset);
  return turn % 9 == 2 && moved > 1000 ? 1000 : moved;
}

static ssize_t write_all(int fd, void* data, std::size_t nbytes, off_t offset) {
  return pwrite(fd, data, nbytes, offset);
}

TEST("spill", "transfers that are interrupted or short go on where they stopped") {
  SpillOptions chosen = options();
  chosen.calls.read = [](int fd, void* data, std::size_t nbytes, off_t offset) {
    return halting(pread, fd, data, nbytes, offset);
  };
  chosen.calls.write = [](int fd, const void* data, std::size_t nbytes, off_t offset) {
    return halting(write_all, fd, const_cast<void*>(data), nbytes, offset);
  };
  SpillStore store(chosen);
  const Content content(5 * kChunk + 99), read(content.size(), 0);
  const SpillSlot slot = put(store, content);
  store.read(slot, read.data(), read.size());
  CHECK(read == content);
}

TEST("spill", "a file system that refuses direct transfers is written through the page cache") {
  SpillOptions chosen = options();
  chosen.calls.write = [](int fd, const void* data, std::size_t nbytes, off_t offset) -> ssize_t {
    if ((fcntl(fd, F_GETFL) & O_DIRECT) == 0) return pwrite(fd, data, nbytes, offset);
    errno = EINVAL;
    return -1;
  };
  SpillStore store(chosen);
  CHECK(!store.is_direct());
  const Content content(5 * kChunk + 99), read(content.size(), 0);
  const SpillSlot slot = put(store, content);
  store.read(slot, read.data(), read.size());
  CHECK(read == content);
}

TEST("spill", "direct transfers that are refused in several threads at once all go on through the page cache") {
  SpillOptions chosen = options();
  static std::atomic<unsigned> refused{0};
  chosen.calls.read = [](int fd, void* data, std::size_t nbytes, off_t offset) -> ssize_t {
    if (nbytes != kChunk || refused >= 3) return pread(fd, data, nbytes, offset);
    ++refused;
    while (refused < 3) std::this_thread::yield();
    errno = EINVAL;
    return -1;
  };
  SpillStore store(chosen);
  CHECK(store.is_direct());
  const Content content(3 * kChunk), read(3 * kChunk, 0);
  store.read(put(store, content), read.data(), read.size());
  CHECK(read == content && !store.is_direct());
}

static std::atomic<int> room_for{1 << 30};

TEST("spill", "a disk that is full in the middle of a master keeps nothing of it and says how much was wanted") {
  SpillOptions chosen = options();
  chosen.calls.write = [](int fd, const void* data, std::size_t nbytes, off_t offset) -> ssize_t {
    if (--room_for >= 0) return pwrite(fd, data, nbytes, offset);
    errno = ENOSPC;
    return -1;
  };
  SpillStore store(chosen);
  const Content content(8 * kChunk);
  room_for = 3;
  const rotator::Error error = error_of([&] { put(store, content); });
  CHECK(error.code == RA_HOST_MEMORY);
  CHECK(error.bytes_wanted == content.size());
  CHECK(error.bytes_free != 0);
  CHECK(error.message.find(folder()) != std::string::npos);
  CHECK(error.message.find(std::to_string(content.size())) != std::string::npos);
  CHECK(store.bytes_used() == 0);
  room_for = 1 << 30;
  const Content read(content.size(), 0);
  store.read(put(store, content), read.data(), read.size());
  CHECK(read == content);
}

TEST("spill", "a limit on the file's size is met before anything is written") {
  signal(SIGXFSZ, SIG_IGN);
  const rlimit limit{1 << 20, RLIM_INFINITY};
  CHECK(setrlimit(RLIMIT_FSIZE, &limit) == 0);
  SpillStore store(options());
  const SpillSlot slot = put(store, Content(1 << 19));
  CHECK(error_of([&] { put(store, Content(1 << 20)); }).code == RA_HOST_MEMORY);
  CHECK(store.bytes_used() == slot.nbytes);
  const Content read(1 << 19, 0);
  store.read(slot, read.data(), read.size());
  CHECK(read == Content(1 << 19));
}

TEST("spill", "a budget on the disk is kept") {
  SpillOptions chosen = options();
  chosen.budget_bytes = 4 * kChunk;
  SpillStore store(chosen);
  const SpillSlot slot = put(store, Content(3 * kChunk));
  const rotator::Error error = error_of([&] { put(store, Content(2 * kChunk)); });
  CHECK(error.code == RA_HOST_MEMORY && error.bytes_wanted == 2 * kChunk && error.bytes_free == kChunk);
  store.give(slot);
  put(store, Content(4 * kChunk));
}

TEST("spill", "a directory that is absent is a clear error") {
  SpillOptions chosen = options();
  chosen.directory += "/absent";
  const rotator::Error error = error_of([&] { SpillStore{chosen}; });
  CHECK(error.code == RA_HOST_MEMORY && error.message.find("/absent") != std::string::npos);
}

TEST("spill", "a store that closes gives up what has not begun") {
  const Content content(64 * kChunk);
  static std::atomic<int> writes{0};
  {
    SpillOptions chosen = options();
    chosen.calls.write = [](int fd, const void* data, std::size_t nbytes, off_t offset) {
      ++writes;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
      return pwrite(fd, data, nbytes, offset);
    };
    SpillStore store(chosen);
    store.start_write(content.data(), content.size(), digest_of(content.data(), content.size()));
  }
  CHECK(writes < 64);
}

TEST("spill", "a forked child cannot use the store and does not keep its bytes") {
  auto store = std::make_unique<SpillStore>(options());
  const Content content(kChunk);
  const SpillSlot slot = put(*store, content);
  Child child([&](Child&) {
    CHECK(bytes_on_disk() == 0);
    CHECK(error_of([&] { store->read(slot, content.data(), content.size()); }).code == RA_INTERNAL);
    store.reset();
  });
  CHECK(child.succeeds());
  store->read(slot, content.data(), content.size());
}
