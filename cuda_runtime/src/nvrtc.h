// Runtime compilation of CUDA C++ by the libnvrtc found on the machine, opened by dlopen.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

namespace dak {

struct CompiledKernel {
  std::string cubin;
  std::string lowered_name;  // the symbol to look up in the cubin
  std::string log;           // the compiler's remarks
};

// One open libnvrtc. Copies of the object would close the library twice, so there are none.
class Nvrtc {
 public:
  // `builtins` may be empty; it is opened first, as libnvrtc looks it up by bare name only.
  // Throws CompilationError where a library or a symbol in it is missing.
  Nvrtc(const std::string& library, const std::string& builtins);
  Nvrtc(const Nvrtc&) = delete;
  Nvrtc& operator=(const Nvrtc&) = delete;

  std::pair<int, int> version() const;

  // Compiles `source` (reported as `file`), in which `headers` (include name, text) are all that
  // can be included. `expression` names the kernel in C++ terms, template arguments and all. Throws
  // CompilationError with the log. Thread-safe.
  CompiledKernel compile(const std::string& source, const std::string& file,
                         const std::vector<std::pair<std::string, std::string>>& headers,
                         const std::vector<std::string>& options,
                         const std::string& expression) const;

 private:
  using Program = struct ProgramObject*;
  struct Functions {
    int (*version)(int*, int*);
    const char* (*error_string)(int);
    int (*create_program)(Program*, const char*, const char*, int, const char* const*,
                          const char* const*);
    int (*destroy_program)(Program*);
    int (*add_name_expression)(Program, const char*);
    int (*compile_program)(Program, int, const char* const*);
    int (*log_size)(Program, size_t*);
    int (*log)(Program, char*);
    int (*cubin_size)(Program, size_t*);
    int (*cubin)(Program, char*);
    int (*lowered_name)(Program, const char*, const char**);
  };

  void check(int status, const char* call, const std::string& log = "") const;
  std::string program_log(Program program) const;

  std::string path_;
  Functions call_{};
};

void bind_nvrtc(pybind11::module_& m);

}  // namespace dak
