// Device memory for the records that kernels read (device_records.py gives them their layout).
#pragma once

#include <memory>

#include "driver.h"

namespace dak {

class RecordChunk {
 public:
  // `nbytes` of zeros, counted as "records" in memory_in_use(). Freed through the reaper. Throws
  // DeviceMemory or Driver.
  static std::shared_ptr<RecordChunk> create(int device, std::size_t nbytes);
  ~RecordChunk();
  RecordChunk(const RecordChunk&) = delete;

  cu::DevicePtr address() const { return address_; }
  std::size_t nbytes() const { return nbytes_; }

  // Copy from or to CPU memory. Done on return, and neither waits for work on other streams nor holds it up.
  void write(const void* bytes, std::size_t count, std::size_t offset);
  void read(void* bytes, std::size_t count, std::size_t offset);

 private:
  RecordChunk(int device, std::size_t nbytes);
  bool release();
  void check(std::size_t count, std::size_t offset) const;

  const int device_;
  const std::size_t nbytes_;
  cu::DevicePtr address_ = 0;
  cu::Stream stream_ = nullptr;
};

}  // namespace dak
