#include "csrc/forks.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <vector>

namespace rotator {

namespace {

// One for the process, because pthread_atfork takes functions without an argument. Never destroyed: a fork may come
// while the process ends.
struct Descriptors {
  std::mutex mutex;
  std::vector<int> open;
};

}  // namespace

static Descriptors& descriptors() {
  static Descriptors* const all = [] {
    auto* made = new Descriptors;
    pthread_atfork([] { descriptors().mutex.lock(); }, [] { descriptors().mutex.unlock(); },
                   [] {
                     for (const int fd : descriptors().open) close(fd);
                     descriptors().open.clear();
                     descriptors().mutex.unlock();
                   });
    return made;
  }();
  return *all;
}

void close_in_children(int fd) {
  Descriptors& all = descriptors();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.open.push_back(fd);
}

void forget_in_children(int fd) {
  Descriptors& all = descriptors();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.open.erase(std::remove(all.open.begin(), all.open.end(), fd), all.open.end());
}

}  // namespace rotator
