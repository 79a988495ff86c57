# Helpers so that every folder declares its targets in one line each.
add_library(vsp_warnings INTERFACE)
target_compile_options(vsp_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -Wno-unused-parameter -Wno-missing-field-initializers>)
add_library(vsp_include INTERFACE)
target_include_directories(vsp_include INTERFACE ${CMAKE_SOURCE_DIR})

# vsp_library(NAME sources... DEPS targets...)
function(vsp_library name)
  cmake_parse_arguments(A "" "" "DEPS" ${ARGN})
  add_library(${name} STATIC ${A_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PUBLIC vsp_include ${A_DEPS} PRIVATE vsp_warnings)
endfunction()

# vsp_binary(NAME sources... DEPS targets...): a program in build/bin
function(vsp_binary name)
  cmake_parse_arguments(A "" "" "DEPS" ${ARGN})
  add_executable(${name} ${A_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE vsp_include vsp_warnings ${A_DEPS})
endfunction()

# vsp_test(NAME sources... LABEL label DEPS targets...): a GoogleTest program, one CTest entry per
# program. Tests run in the source folder and find models through the environment of tests/run.sh.
function(vsp_test name)
  cmake_parse_arguments(A "" "LABEL;TIMEOUT" "DEPS" ${ARGN})
  add_executable(${name} ${A_UNPARSED_ARGUMENTS})
  target_link_libraries(${name} PRIVATE vsp_include vsp_warnings ${A_DEPS} GTest::gmock GTest::gtest_main)
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
  if(NOT A_LABEL)
    set(A_LABEL unit)
  endif()
  if(NOT A_TIMEOUT)
    set(A_TIMEOUT 600)
  endif()
  set_tests_properties(${name} PROPERTIES LABELS "${A_LABEL}" TIMEOUT ${A_TIMEOUT}
    SKIP_RETURN_CODE 77)
endfunction()
