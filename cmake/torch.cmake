# pyeff/_C.abi3.so: the kernels and their registration with torch's dispatcher, on torch's stable ABI only.

# The ABI of torch 2.11: what the library uses must be in that version. Both compilers must be told.
set(PYEFF_TORCH_TARGET 0x020b000000000000)

# Neither imported nor found by find_package(Torch), which asks for a whole C++ toolchain of torch's choice: the headers and
# one library are enough.
if(NOT PYEFF_TORCH_DIR)
  find_package(Python3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND "${Python3_EXECUTABLE}" -c
            "import importlib.util, os; print(os.path.dirname(importlib.util.find_spec('torch').origin), end='')"
    OUTPUT_VARIABLE PYEFF_FOUND_TORCH ERROR_QUIET)
  set(PYEFF_TORCH_DIR "${PYEFF_FOUND_TORCH}" CACHE PATH "The folder of the torch package" FORCE)
endif()
if(NOT EXISTS "${PYEFF_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "pyeff: no headers of torch >= 2.11 in '${PYEFF_TORCH_DIR}'; name its folder by PYEFF_TORCH_DIR")
endif()
find_library(PYEFF_TORCH_LIBRARY torch_cpu PATHS "${PYEFF_TORCH_DIR}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
message(STATUS "pyeff: torch in ${PYEFF_TORCH_DIR}")

function(pyeff_use_torch target)
  target_include_directories(${target} SYSTEM PRIVATE "${PYEFF_TORCH_DIR}/include")
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=${PYEFF_TORCH_TARGET})
  target_link_libraries(${target} PRIVATE "${PYEFF_TORCH_LIBRARY}")
  if(NOT APPLE)
    target_link_options(${target} PRIVATE -Wl,-z,defs)
  endif()
endfunction()

file(GLOB PYEFF_OPS CONFIGURE_DEPENDS csrc/ops/*.cpp)
add_library(pyeff_C MODULE ${PYEFF_OPS})
set_target_properties(pyeff_C PROPERTIES OUTPUT_NAME _C PREFIX "" SUFFIX .abi3.so
                      LIBRARY_OUTPUT_DIRECTORY "${PYEFF_OUTPUT}" SKIP_BUILD_RPATH ON)
target_link_libraries(pyeff_C PRIVATE pyeff_kernels)
pyeff_use_torch(pyeff_C)

if(PYEFF_CUDA)
  include(cmake/cuda.cmake)
endif()
