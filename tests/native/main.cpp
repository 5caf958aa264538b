// usage: native_tests [GROUP]: runs the tests of one group, or all, and says which failed.
#include <poll.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>

#include "check.h"

namespace check {

struct Failure {
  std::string what;
};

static std::string own_folder;

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

void fail(const char* file, int line, const std::string& what) {
  throw Failure{std::string(file) + ":" + std::to_string(line) + ": " + what};
}

rotator::Error error_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const rotator::Error& error) {
    return error;
  }
  fail(__FILE__, __LINE__, "no error was thrown");
}

const std::string& folder() { return own_folder; }

std::string write_file(const std::string& path, const std::string& text) {
  const std::filesystem::path whole = std::filesystem::path(own_folder) / path;
  std::filesystem::create_directories(whole.parent_path());
  std::ofstream(whole) << text;
  return whole;
}

Child::Child(const std::function<void(Child&)>& body) {
  CHECK(pipe(to_child_) == 0 && pipe(to_parent_) == 0);
  pid = fork();
  CHECK(pid >= 0);
  if (pid != 0) {
    close(to_child_[0]);
    close(to_parent_[1]);
    return;
  }
  close(to_child_[1]);
  close(to_parent_[0]);
  int code = 0;
  try {
    body(*this);
  } catch (const Failure& failure) {
    std::fprintf(stderr, "  in a child: %s\n", failure.what.c_str());
    code = 1;
  } catch (const rotator::Error& error) {
    std::fprintf(stderr, "  in a child: %s\n", error.message.c_str());
    code = 1;
  }
  std::fflush(stderr);
  _exit(code);
}

Child::~Child() {
  if (pid == 0) return;
  if (pid > 0) kill_hard();
  close(to_child_[1]);
  close(to_parent_[0]);
}

static void put(int fd) { CHECK(write(fd, "!", 1) == 1); }

void Child::say() const { put(to_parent_[1]); }
void Child::tell() const { put(to_child_[1]); }

void Child::listen() const {
  pollfd from{pid == 0 ? to_child_[0] : to_parent_[0], POLLIN, 0};
  char byte;
  CHECK(poll(&from, 1, 20'000) == 1);
  CHECK(read(from.fd, &byte, 1) == 1);
}

void Child::kill_hard() {
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  pid = -1;
}

bool Child::succeeds() {
  int status = 0;
  CHECK(waitpid(pid, &status, 0) == pid);
  pid = -1;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

static void run_body(const Test& test) {
  int code = 1;
  try {
    test.body();
    code = 0;
  } catch (const Failure& failure) {
    std::fprintf(stderr, "  %s\n", failure.what.c_str());
  } catch (const rotator::Error& error) {
    std::fprintf(stderr, "  unexpected error %d: %s\n", error.code, error.message.c_str());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "  unexpected exception: %s\n", error.what());
  }
  // exit, not _exit: the sanitizers look for leaks there.
  std::exit(code);
}

static bool run(const Test& test) {
  char path[] = "/tmp/rotator-native-XXXXXX";
  CHECK(mkdtemp(path) != nullptr);
  own_folder = path;
  std::fflush(nullptr);
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(60);
    run_body(test);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  std::filesystem::remove_all(own_folder);
  const bool passed = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  std::printf("%s  %s: %s\n", passed ? "ok  " : "FAIL", test.group, test.sentence);
  if (WIFSIGNALED(status)) std::printf("      killed by %s\n", strsignal(WTERMSIG(status)));
  return passed;
}

}  // namespace check

int main(int argc, char** argv) {
  int failed = 0, ran = 0;
  for (const check::Test& test : check::tests()) {
    if (argc > 1 && std::strcmp(test.group, argv[1]) != 0) continue;
    ++ran;
    failed += check::run(test) ? 0 : 1;
  }
  std::printf("%d tests, %d failed\n", ran, failed);
  return failed != 0 || ran == 0 ? 1 : 0;
}
