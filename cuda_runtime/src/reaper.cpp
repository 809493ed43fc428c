#include "reaper.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <iterator>
#include <mutex>
#include <thread>
#include <utility>

namespace dak::reaper {
namespace {

using namespace std::chrono_literals;
constexpr auto CAPTURE_POLL = 2ms;
constexpr int ATTEMPTS = 3;

struct Note {
  std::vector<int> devices;
  std::function<void()> task;
  int failures = 0;
};

struct State {
  std::mutex mutex;
  std::condition_variable work, idle;
  std::deque<Note> notes;
  std::vector<cu::Stream> streams;
  std::thread thread;
  bool running = false;   // the thread exists
  bool busy = false;      // it is outside the lock with notes in hand
  bool stopping = false;  // for good
};
State& state() {
  static State* instance = new State;  // deleters run during and after static destruction
  return *instance;
}

bool capture_is_open(const std::vector<cu::Stream>& streams) {
  for (cu::Stream stream : streams) {
    cu::CaptureStatus status = cu::CAPTURE_NONE;
    if (driver().cuStreamIsCapturing.status(stream, &status) == cu::SUCCESS &&
        status == cu::CAPTURE_ACTIVE)
      return true;
  }
  return false;
}

// False if a capture is open on a device, so that waiting has to be tried again.
bool wait_for(const std::vector<int>& devices, const std::vector<cu::Stream>& streams) {
  if (devices.empty()) return true;
  if (capture_is_open(streams)) return false;
  for (int device : devices) {
    DeviceScope scope(device);
    if (driver().cuCtxSynchronize.status() == cu::ERROR_STREAM_CAPTURE_UNSUPPORTED) return false;
    // Any other failure is a dead context: nothing runs there any more.
  }
  return true;
}

// True when the note is done with: its task has run, or has failed too often. What a task that throws would
// have freed is lost, and stays in the counts.
bool settle(Note& note, const std::vector<cu::Stream>& streams) {
  try {
    if (!wait_for(note.devices, streams)) return false;
    note.task();
    return true;
  } catch (...) {
    return ++note.failures >= ATTEMPTS;
  }
}

void run() {
  State& s = state();
  std::unique_lock lock(s.mutex);
  while (true) {
    s.work.wait(lock, [&] { return s.stopping || !s.notes.empty(); });
    if (s.notes.empty()) return;
    std::deque<Note> notes = std::move(s.notes);
    s.notes.clear();
    const std::vector<cu::Stream> streams = s.streams;
    s.busy = true;
    lock.unlock();
    std::erase_if(notes, [&](Note& note) { return settle(note, streams); });
    lock.lock();
    if (!notes.empty() && !s.stopping) {
      s.notes.insert(s.notes.begin(), std::make_move_iterator(notes.begin()),
                     std::make_move_iterator(notes.end()));
      s.work.wait_for(lock, CAPTURE_POLL, [&] { return s.stopping; });
    }
    s.busy = false;
    if (s.notes.empty()) s.idle.notify_all();
  }
}

}  // namespace

void enqueue(std::vector<int> devices, std::function<void()> task) noexcept {
  if (in_forked_child()) return;
  try {
    State& s = state();
    std::lock_guard lock(s.mutex);
    if (s.stopping) return;
    if (!s.running) {
      s.thread = std::thread(run);
      s.running = true;
    }
    s.notes.push_back({std::move(devices), std::move(task)});
    s.work.notify_one();
  } catch (...) {
    // No memory for a note, no thread to read it: what it would have freed stays until the process ends.
  }
}

bool drain(double seconds) {
  if (in_forked_child()) return true;
  State& s = state();
  std::unique_lock lock(s.mutex);
  return s.idle.wait_for(lock, std::chrono::duration<double>(seconds),
                         [&] { return s.notes.empty() && !s.busy; });
}

void shutdown(double seconds) {
  if (in_forked_child()) return;
  drain(seconds);
  State& s = state();
  std::thread thread;
  {
    std::lock_guard lock(s.mutex);
    s.stopping = true;
    thread = std::move(s.thread);
    s.work.notify_all();
  }
  if (thread.joinable()) thread.join();
}

void watch_streams(std::vector<cu::Stream> streams) {
  State& s = state();
  std::lock_guard lock(s.mutex);
  s.streams = std::move(streams);
}

bool capture_is_open() {
  driver();
  std::vector<cu::Stream> streams;
  {
    State& s = state();
    std::lock_guard lock(s.mutex);
    streams = s.streams;
  }
  return capture_is_open(streams);
}

}  // namespace dak::reaper
