# pyeff_dev: the kernels on NumPy arrays. It stays in the build tree (tests find it in build/dev) and in no wheel.
set(PYBIND11_FINDPYTHON ON)
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
execute_process(COMMAND "${Python_EXECUTABLE}" -m pybind11 --cmakedir OUTPUT_VARIABLE PYEFF_PYBIND11
                OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
find_package(pybind11 REQUIRED CONFIG HINTS "${PYEFF_PYBIND11}")

file(GLOB PYEFF_DEV_SOURCES CONFIGURE_DEPENDS csrc/dev/*.cpp)
pybind11_add_module(pyeff_dev MODULE NO_EXTRAS ${PYEFF_DEV_SOURCES})
target_link_libraries(pyeff_dev PRIVATE pyeff_probes)
set_target_properties(pyeff_dev PROPERTIES LIBRARY_OUTPUT_DIRECTORY "${CMAKE_SOURCE_DIR}/build/dev")
