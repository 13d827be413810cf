#!/usr/bin/env python3
"""A second reader of cache devices, written from wb(5) alone.

    reader.py CACHE [BACKING]   prints what the cache device holds, as a line of JSON
    reader.py                   the same for each line of standard input, which is
                                "CACHE" or "CACHE<tab>BACKING"

It changes nothing and needs only Python 3. It tests the manual page: where it and wb differ, the
page or one of the two is wrong. So mend it with a better page, never with a look at wb's code. The
sections named below are those of wb(5).

Members of the JSON:

    refused       a list of reasons, empty if the device is accepted
    record        the superblock record
    written_back, highest, point    W, H and P, ids of segments
    skipped, dropped, live          lists of ids of segments
    read_only     whether the device must not be written
    unreadable    with a backing device: the blocks whose data fails its CRC
    sha256        with a backing device: the SHA-256 of the volume, if all blocks are readable
"""
import hashlib
import json
import os
import struct
import sys

from crc32c import append_block, crc32c

SECTOR, BLOCK, SEGMENT, REGION = 512, 4096, 512 * 1024, 1024 * 1024
PLACES = 127
LARGEST_ID = 1 << 56
LAST_SANE_ID = 1 << 55

# --- Layout ---


def u32(data, at):
    return struct.unpack_from("<I", data, at)[0]


def u64(data, at):
    return struct.unpack_from("<Q", data, at)[0]


def without(data, *places):
    """The same bytes with four zeros at each place. A CRC that covers itself is taken this way."""
    data = bytearray(data)
    for at in places:
        data[at : at + 4] = bytes(4)
    return bytes(data)


class Page:
    """A superblock page."""

    def __init__(self, block):
        self.is_there = block[:8] == b"wb-super"
        self.generation = u64(block, 8)
        holds = u32(block, 4092) == crc32c(block[:4092])
        self.is_sound = self.is_there and holds and self.generation < 2**63
        numbers = struct.unpack_from("<4I", block, 16)
        self.version, self.incompatible, self.read_compatible, has_mark = numbers
        self.clean = u64(block, 32) if has_mark == 1 else 0
        self.digest = crc32c(block[48:64])
        self.backing_sectors = u64(block, 128)
        self.cache_bytes = u64(block, 200)


class Record:
    """The superblock record."""

    def __init__(self, sector, digest):
        self.id = u64(sector, 0)
        self.has_marker = sector[8:16] == b"wbrecord"
        self.is_proved = self.has_marker and u32(sector, 20) == crc32c(without(sector, 20))
        is_foreign = self.is_proved and digest is not None and u32(sector, 16) != digest
        is_plain = not any(sector[8:])
        self.is_sound = self.id <= LARGEST_ID and (is_plain or self.is_proved and not is_foreign)


class Slot:
    """What a slot holds. Its `kind` is one of

    "empty"      nothing, or a segment of another cache
    "valid"      a segment
    "misplaced"  a segment that belongs elsewhere
    "torn"       what a power cut may leave of one
    "uncommitted" what a power cut leaves of one only when what it overwrote was written back
    "damaged"    what no power cut leaves
    """

    def __init__(self, device, number, slots, digest):
        self.number = number
        self.offset = REGION + number * SEGMENT
        self.device = device
        self.proved = self.cut_short = self.has_marker = False
        self.entries = []
        self.header = device.read(self.offset, BLOCK)
        self.id, self.checksum, self.length = struct.unpack_from("<QIB", self.header)
        self.belongs = self.id > 0 and (self.id - 1) % slots == number
        self.kind = self.judge(self.header[:SECTOR], digest)

    def judge(self, first, digest):
        if not any(first):
            return "empty"
        if any(first[13:]):
            self.has_marker = first[16:20] == b"wbsg"
            if self.has_marker:
                before_commits = not any(first[56:])
                if before_commits:
                    self.proved = u32(first, 24) == crc32c(without(self.header, 24))
                else:
                    cleared = without(first, 24, 64)
                    self.proved = first[56] == 1 and u32(first, 64) == crc32c(cleared)
                if not self.proved:
                    return "torn" if before_commits else "damaged"
            elif digest is not None:
                return "damaged"
        if self.id == 0:
            return "damaged"
        if self.id > LARGEST_ID or self.length > PLACES:
            self.proved = False
            return "torn"
        self.is_open = self.proved and first[28] == 6
        self.durable, self.written_back = struct.unpack_from("<QQ", first, 32)
        commits = [(self.length, self.checksum)]
        if self.proved and first[56] == 1 and 1 <= first[57] <= PLACES:
            commits.append((first[57], u32(first, 60)))
        stands = self.find_commit(commits)
        is_foreign = self.proved and digest is not None and u32(first, 20) != digest
        self.proved = self.proved and self.belongs and not is_foreign
        if not self.belongs:
            return "misplaced" if stands else "torn"
        if not stands:
            return "uncommitted" if len(commits) == 2 else "torn"
        return "empty" if is_foreign else "valid"

    def find_commit(self, commits):
        """Finds the newest commit that stands."""
        if self.stands(commits[0], self.header):
            return True
        for length, checksum in commits:
            entries_end = 512 + 16 * length
            cleared = self.header[:entries_end] + bytes(BLOCK - entries_end)
            if length > 0 and self.stands((length, checksum), cleared):
                self.cut_short = True
                return True
        return False

    def stands(self, commit, header):
        length, checksum = commit
        if length > self.length:
            return False
        crc = crc32c(header[512:])
        for index in range(length):
            crc = append_block(crc, self.data(index))
        places = range(512, 512 + 16 * length, 16)
        entries = [struct.unpack_from("<QBBxxI", header, at) for at in places]
        if crc != checksum or any(address % 8 for address, *_ in entries):
            return False
        self.entries = entries
        return True

    def data(self, index):
        return self.device.read(self.offset + BLOCK * (1 + index), BLOCK)


# --- Recovery ---


class Device:
    """A device or file. Reads only what the caller asks for."""

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.lseek(self.fd, 0, os.SEEK_END)

    def read(self, offset, length):
        return os.pread(self.fd, length, offset)

    def close(self):
        os.close(self.fd)


class Log:
    """What recovery makes of a cache device. `refused` holds the reasons not to use it."""

    def __init__(self, device):
        self.refused = []
        self.page = self.highest = None
        self.slots = (device.size // SECTOR - 2048) // 1024
        if device.size % SECTOR or self.slots < 1:
            return self.refuse("size")
        if u32(device.read(0, 4), 0) != 0x57427374:
            return self.refuse("magic")
        # If both have the same generation, max() takes the first.
        pages = [Page(device.read(at, BLOCK)) for at in (128 * 1024, 64 * 1024)]
        sound = [page for page in pages if page.is_sound]
        self.page = max(sound, key=lambda page: page.generation, default=None)
        digest = self.page and self.page.digest
        record = Record(device.read(REGION - SECTOR, SECTOR), digest)
        if not record.is_sound:
            return self.refuse("record")
        self.record = record.id
        self.read_only = False
        if self.page:
            if self.page.version != 1:
                return self.refuse("version")
            if self.page.incompatible:
                return self.refuse("features")
            if self.page.cache_bytes != device.size:
                return self.refuse("cache-size")
            self.read_only = self.page.read_compatible != 0
        self.all_slots = [Slot(device, number, self.slots, digest) for number in range(self.slots)]
        if not self.page:
            traces = any(page.is_there for page in pages) or record.has_marker
            if traces or any(slot.has_marker for slot in self.all_slots):
                self.refuse("pairing-lost")
        self.find_claims()
        self.find_incomplete()
        self.find_point()
        self.find_corruption()

    def refuse(self, why):
        self.refused.append(why)

    def slot_of(self, segment):
        return self.all_slots[(segment - 1) % self.slots]

    def is_valid(self, segment):
        slot = self.slot_of(segment)
        return slot.kind == "valid" and slot.id == segment

    def valid_ids(self):
        return [slot.id for slot in self.all_slots if slot.kind == "valid"]

    def find_claims(self):
        """Reads the claims of proved headers, and the clean mark."""
        self.durable = self.page.clean if self.page else 0
        self.claimed_back = 0
        for slot in self.all_slots:
            if slot.proved:
                if slot.durable < slot.id:
                    self.durable = max(self.durable, slot.durable)
                if slot.written_back < slot.id:
                    self.claimed_back = max(self.claimed_back, slot.written_back)

    def find_incomplete(self):
        """Finds segments that end the log. Those that may not end it count as damaged."""
        ids = self.valid_ids()
        highest = max(ids, default=0)
        modules = max((i for i in ids if not self.slot_of(i).proved), default=0)
        self.last = set()
        for segment in ids:
            slot = self.slot_of(segment)
            goes_on = self.is_valid(segment + 1) and not self.slot_of(segment + 1).proved
            if slot.cut_short or slot.is_open and not goes_on:
                self.last.add(segment)
        for segment in self.last:
            # A log of one slot is written over its newest segment.
            overwritten = self.slots == 1 and segment <= self.record
            overwritten = overwritten and self.slot_of(segment).cut_short
            unexplained = segment <= self.durable or highest - segment >= self.window()
            if unexplained or segment < modules or overwritten:
                # Why it lacks blocks does not matter here. What explains a torn segment explains it
                # as well.
                self.slot_of(segment).kind = "torn"

    def window(self):
        return max(1, self.slots // 4)

    def find_point(self):
        self.highest = max(self.valid_ids(), default=0)
        oldest = max(0, self.highest - self.slots)
        self.written_back = max(self.record, oldest, self.claimed_back)
        is_modules = not self.page or self.highest == 0 or not self.slot_of(self.highest).proved
        self.skipped = []
        if is_modules and self.written_back == oldest:
            limit = self.highest - self.slots + self.window()
            missing = [i for i in range(self.written_back + 1, limit + 1) if not self.is_valid(i)]
            self.skipped = list(range(self.written_back + 1, max(missing, default=0) + 1))
        self.start = self.written_back + len(self.skipped) + 1
        self.point = self.start - 1
        while self.is_valid(self.point + 1):
            self.point += 1
            if self.point in self.last:
                break
        self.live = list(range(self.start, self.point + 1))
        self.dropped = sorted(i for i in self.valid_ids() if i > self.point)

    def find_corruption(self):
        if self.durable > self.point:
            self.refuse("durable-missing")
        if self.highest - self.point > self.window():
            self.refuse("gap")
        if self.page and len({self.slot_of(segment).proved for segment in self.dropped}) == 2:
            self.refuse("written-past-hole")
        is_alone = self.slots == 1 and self.highest == 0
        under_overwrite = is_alone and self.all_slots[0].kind != "empty"
        if self.record > self.highest and not under_overwrite:
            self.refuse("record-beyond-log")
        if self.point > LAST_SANE_ID:
            self.refuse("ids-exhausted")
        for slot in self.all_slots:
            if slot.kind == "misplaced":
                self.refuse("misplaced")
            elif slot.kind not in ("empty", "valid") and not self.is_explained(slot):
                self.refuse("damaged")

    def is_explained(self, slot):
        """Whether a power cut explains what a slot holds, or its content is written back."""
        newest = self.point + self.window()
        if newest - (newest - 1 - slot.number) % self.slots > self.point:
            return slot.kind == "torn" or slot.kind == "uncommitted" and slot.id < self.start
        held = self.point - (self.point - 1 - slot.number) % self.slots
        return 0 < held < self.start


# --- The volume ---


def volume(log, backing):
    """The content of the volume, and its blocks that cannot be read."""
    sectors = backing.size // SECTOR
    if log.page and log.page.backing_sectors not in (0, sectors):
        return log.refuse("backing-size")
    content = bytearray(backing.read(0, backing.size))
    # The entry that each sector shows, by its number. Later entries replace earlier ones.
    shown = {}
    for segment in log.live:
        slot = log.slot_of(segment)
        for index, (address, dirty, flags, crc) in enumerate(slot.entries):
            for bit in range(8):
                if dirty >> bit & 1:
                    if address + bit >= sectors:
                        return log.refuse("beyond-backing")
                    kept = crc if log.page and flags & 1 else None
                    shown[address + bit] = (slot, index, kept)
    unreadable = set()
    for sector, (slot, index, crc) in shown.items():
        data = slot.data(index)
        if crc not in (None, crc32c(data)):
            unreadable.add(sector // 8)
        at = sector % 8 * SECTOR
        content[sector * SECTOR : (sector + 1) * SECTOR] = data[at : at + SECTOR]
    return content, sorted(unreadable)


def read(cache, backing=None):
    """Describes a cache device, and the volume that it makes with a backing device."""
    device = Device(cache)
    log = Log(device)
    result = {"refused": log.refused}
    if log.highest is not None:
        ids = ("record", "written_back", "highest", "point", "skipped", "dropped", "live")
        names = (*ids, "read_only")
        result.update((name, getattr(log, name)) for name in names)
    if backing is not None and not log.refused:
        backing = Device(backing)
        found = volume(log, backing)
        backing.close()
        if found:
            content, result["unreadable"] = found
            if not result["unreadable"]:
                result["sha256"] = hashlib.sha256(content).hexdigest()
    device.close()
    return result


def main(arguments):
    if arguments:
        print(json.dumps(read(*arguments)))
        return
    for line in sys.stdin:
        print(json.dumps(read(*line.rstrip("\n").split("\t"))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
