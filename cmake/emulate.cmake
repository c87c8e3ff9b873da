# The CUDA kernels once more, for the CPU: each .cu of csrc/cuda is also compiled by the C++ compiler, over the emulated
# half of csrc/cuda/portable.cuh. Tests alone use this; nothing of it is in a wheel.

# The machine under the kernels. ThreadSanitizer is to see what the kernels do, not how fibers share the machine.
file(GLOB PYEFF_EMULATOR CONFIGURE_DEPENDS csrc/cuda/emulate/*.cpp)
add_library(pyeff_emulator OBJECT EXCLUDE_FROM_ALL ${PYEFF_EMULATOR})
target_link_libraries(pyeff_emulator PRIVATE pyeff_flags)
target_compile_options(pyeff_emulator PRIVATE -O2)
if(PYEFF_SANITIZE MATCHES "thread")
  # On the sources, because those options come last.
  set_source_files_properties(${PYEFF_EMULATOR} PROPERTIES COMPILE_OPTIONS -fno-sanitize=thread)
  target_compile_definitions(pyeff_emulator PRIVATE PYEFF_TSAN)
endif()

# Sources that say nothing but #include: what language a .cu is in can be said only once in a folder, and nvcc has it.
function(pyeff_emulate_sources result)
  set(sources)
  foreach(source ${ARGN})
    file(RELATIVE_PATH path "${CMAKE_SOURCE_DIR}" "${source}")
    set(wrapper "${CMAKE_BINARY_DIR}/emulated/${path}.cpp")
    set(PYEFF_EMULATED_SOURCE "${source}")
    file(CONFIGURE OUTPUT "${wrapper}" CONTENT "#include \"@PYEFF_EMULATED_SOURCE@\"\n" @ONLY)
    list(APPEND sources "${wrapper}")
  endforeach()
  set(${result} ${sources} PARENT_SCOPE)
endfunction()

# Objects of emulated kernels, with the machine that they need, behind the interface library `name`.
function(pyeff_add_emulated name)
  add_library(${name} INTERFACE)
  target_sources(${name} INTERFACE $<TARGET_OBJECTS:pyeff_emulator>)
  target_link_libraries(${name} INTERFACE pyeff_flags)
  pyeff_emulate_sources(sources ${ARGN})
  if(sources)
    add_library(${name}_objects OBJECT EXCLUDE_FROM_ALL ${sources})
    target_link_libraries(${name}_objects PRIVATE pyeff_flags)
    if(NOT PYEFF_SANITIZE)
      target_compile_options(${name}_objects PRIVATE -O2)
    endif()
    target_sources(${name} INTERFACE $<TARGET_OBJECTS:${name}_objects>)
  endif()
endfunction()

# device.cu asks the driver what devices there are; all else is kernels and their launches.
file(GLOB PYEFF_EMULATED CONFIGURE_DEPENDS csrc/cuda/*.cu)
list(FILTER PYEFF_EMULATED EXCLUDE REGEX "/device\\.cu$")
pyeff_add_emulated(pyeff_emulated_kernels ${PYEFF_EMULATED})

# The names under which the sources of the kernels launch them, with spaces between: what a run of all tests must have
# launched.
function(pyeff_kernel_names result)
  file(GLOB sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cuh)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${sources})
  set(found)
  foreach(source ${sources})
    file(READ "${source}" text)
    string(REGEX MATCHALL "run\\([ \n]*\"[A-Za-z0-9_]+\"" calls "${text}")
    list(TRANSFORM calls REPLACE "run\\([ \n]*\"([A-Za-z0-9_]+)\"" "\\1")
    list(APPEND found ${calls})
  endforeach()
  list(REMOVE_DUPLICATES found)
  list(JOIN found " " found)
  set(${result} "${found}" PARENT_SCOPE)
endfunction()

# build/dev/pyeff_emulated.so: their registration with torch's dispatcher, for CPU tensors.
file(GLOB PYEFF_EMULATED_OPS CONFIGURE_DEPENDS csrc/emulated/*.cpp)
if(PYEFF_DEV AND PYEFF_TORCH AND PYEFF_EMULATED_OPS)
  add_library(pyeff_emulated MODULE ${PYEFF_EMULATED_OPS})
  set_target_properties(pyeff_emulated PROPERTIES PREFIX "" SUFFIX .so SKIP_BUILD_RPATH ON
                        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_SOURCE_DIR}/build/dev")
  target_link_libraries(pyeff_emulated PRIVATE pyeff_emulated_kernels)
  pyeff_use_torch(pyeff_emulated)
endif()
