"""The bytes of a replica file. The only definition: the stage writes them, recovery and verify read them.

    0 ─────────────── 4096 ──────────── +128 ───────────────────────── +n·64
    | superblock      | record header  | payload, zeroes up to 64     | next record ...
    | JSON, checksum  |                                              |

A record belongs to its file by `file_tag`, the checksum of the superblock: what an earlier file left on the same blocks
of the disk never matches. A record without messages is a note: it only says how far the topic was durable.
"""

from libc.stdint cimport uint32_t, uint64_t

from broker.layout cimport OrderEntry

cdef enum:
    REPLICA_MAGIC = 0x4C51584D          # "MXQL"
    REPLICA_ALIGNMENT = 64
    REPLICA_SUPERBLOCK = 4096

cdef packed struct ReplicaRecord:
    OrderEntry entry                    # as it was in memory; its offset means nothing here
    uint64_t index                      # order entry
    uint64_t durable_position           # messages below it were on every disk that the topic wants, when this was written
    uint64_t committed_position         # messages below it had their order then
    uint64_t first_position             # messages below it were reclaimed then
    uint32_t magic
    uint32_t file_tag
    uint32_t payload_crc                # CRC32C
    uint32_t reserved[4]
    uint32_t header_crc                 # CRC32C of all before it
