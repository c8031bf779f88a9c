# The objects of each level define only what stands in its own namespace: an inline function with
# external linkage would be compiled once per level, and the linker might keep the AVX-512 copy.
execute_process(COMMAND ${NM} --defined-only -A ${ARCHIVE} OUTPUT_VARIABLE symbols
                COMMAND_ERROR_IS_FATAL ANY)
string(REPLACE ";" "," symbols "${symbols}")
string(REPLACE "\n" ";" symbols "${symbols}")
set(seen 0)
foreach(line IN LISTS symbols)
  if(line MATCHES ":[a-z]+_(v2|v3|v4|v4x|neon)\\.cc\\.o:[0-9a-f ]+ ([A-Za-z]) (.*)$")
    set(level ${CMAKE_MATCH_1})
    set(type ${CMAKE_MATCH_2})
    set(symbol "${CMAKE_MATCH_3}")
    if(type MATCHES "^[tdrb]$")
      continue() # local to the object
    endif()
    math(EXPR seen "${seen} + 1")
    string(LENGTH ${level} length)
    if(NOT symbol MATCHES "^_+Z[A-Z]*6pentad${length}${level}") # mangled pentad::level::
      message(FATAL_ERROR "a unit of ${level} defines the shared symbol ${symbol} (${type})")
    endif()
  endif()
endforeach()
if(seen EQUAL 0)
  message(FATAL_ERROR "found no kernel table in ${ARCHIVE}")
endif()
message("${seen} symbols, each in its level's namespace")
