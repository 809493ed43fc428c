// One exception type for the extension; its `kind` names the Python class of dak_inductor.errors that it
// becomes (register_errors). No Python header: worker threads throw and catch it without the interpreter.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace dak {

enum class ErrorKind {
  Driver,             // DriverError: a driver call failed; `call` and `status` say which and how
  UnsupportedDriver,  // UnsupportedDriverError: no driver, or a function is missing
  Tier,               // TierError: an argument that makes no sense
  TieredTensor,       // TieredTensorError: use in a forked child
  HostMemory,         // HostMemoryError
  DeviceMemory,       // DeviceMemoryError
  Move,               // MoveError: the old state stands
  Compilation,        // CompilationError
  Checkpoint,         // CheckpointError: a file that cannot be read
};

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message, std::string call = {}, int status = 0)
      : std::runtime_error(message), kind(kind), call(std::move(call)), status(status) {}

  ErrorKind kind;
  std::string call;  // name of the driver call, for Driver and UnsupportedDriver
  int status;        // its CUresult
};

}  // namespace dak
