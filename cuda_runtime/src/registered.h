// Memory for systems whose driver refuses host pages: whole tensors, in HBM or in registered host memory.
#pragma once

#include <memory>

#include "driver.h"

namespace dak {

class RegisteredBlock {
 public:
  // `remote`: page-locked host memory of exactly the kernel pages needed, mapped for every device; else
  // device memory. Freed through the reaper. Throws HostMemory, DeviceMemory or Driver.
  static std::shared_ptr<RegisteredBlock> create(int device, std::size_t nbytes, bool remote);
  ~RegisteredBlock();
  RegisteredBlock(const RegisteredBlock&) = delete;

  cu::DevicePtr address() const { return address_; }  // as the device sees it
  void* host() const { return host_; }                // as the CPU sees it; null for device memory
  std::size_t nbytes() const { return nbytes_; }
  std::size_t physical_bytes() const { return held_; }

  // Copy from or to CPU memory, synchronously.
  void write(const void* bytes, std::size_t count, std::size_t offset);
  void read(void* bytes, std::size_t count, std::size_t offset);

 private:
  RegisteredBlock(int device, std::size_t nbytes, bool remote);
  void take_host_memory();
  void check(std::size_t count, std::size_t offset) const;

  const int device_;
  const std::size_t nbytes_;
  std::size_t held_ = 0;
  cu::DevicePtr address_ = 0;
  void* host_ = nullptr;
};

}  // namespace dak
