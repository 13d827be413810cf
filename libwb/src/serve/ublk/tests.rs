use super::*;
use crate::device::probe::Traits;

#[test]
fn what_the_driver_is_told_of_a_device() {
    let backing = Traits { physical_sector_size: Some(4096), rotational: true };
    let options = Options { sector_size: 512, read_only: true, backing };
    let it = parameters(&options, 1 << 30);
    assert_eq!(NativeEndian::read_u32(&it[8..]), 0b1111, "attributes");
    assert_eq!(it[12..16], [9, 12, 12, 12], "shifts of the sizes");
    assert_eq!(NativeEndian::read_u32(&it[16..]), MAX_REQUEST / 512);
    assert_eq!(NativeEndian::read_u64(&it[24..]), 1 << 21, "sectors");
    let plain = Options { sector_size: 4096, read_only: false, backing: Traits::default() };
    let it = parameters(&plain, 1 << 30);
    assert_eq!((NativeEndian::read_u32(&it[8..]), it[12], it[13]), (0b1100, 12, 12));
}

#[test]
fn a_process_lives_until_it_has_ended_even_if_no_one_has_looked() {
    assert!(is_alive(std::process::id()));
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let begun = std::time::Instant::now();
    while is_alive(child.id()) && begun.elapsed().as_secs() < 60 {
        std::thread::yield_now();
    }
    assert!(!is_alive(child.id()), "it has ended, but was not waited for");
    child.wait().unwrap();
    assert!(!is_alive(u32::MAX));
}

#[test]
fn a_device_is_told_by_its_number() {
    assert_eq!(number_of(Path::new("/dev/ublkb12")), Some(12));
    for other in ["/dev/loop0", "/dev/ublkb", "/dev/ublkb1p1", "/"] {
        assert_eq!(number_of(Path::new(other)), None, "{other}");
    }
}

#[test]
fn what_the_driver_says_of_a_device_is_read_as_it_is_written() {
    let info = Info {
        queues: 1,
        depth: 7,
        max_request: 4096,
        number: 3,
        flags: 5,
        of_owner: OURS,
        state: 0,
    };
    let read = Info::decode(&info.encode());
    assert_eq!((read.queues, read.depth, read.max_request, read.number), (1, 7, 4096, 3));
    assert_eq!((read.flags, read.of_owner, read.state), (5, OURS, Info::DEAD));
    assert_eq!(read.owner(), Some(0));
    assert_eq!(Info { of_owner: OURS | 77, ..info }.owner(), Some(77));
    assert_eq!(Info { of_owner: 77, ..info }.owner(), None);
}

#[test]
fn only_the_own_device_is_taken_over_and_only_if_it_is_as_expected() {
    let own = Info {
        queues: 1,
        depth: DEPTH,
        max_request: MAX_REQUEST,
        of_owner: OURS | 77,
        ..Info::default()
    };
    let refused = |info: Info, keeper| {
        let told = info.refuse_to_resume(keeper, Path::new("/dev/ublkb0"));
        told.err().map(|e| e.to_string()).unwrap_or_default()
    };
    assert_eq!(refused(own, Some(77)), "");
    for other in [Some(78), None] {
        assert!(refused(own, other).contains("not this volume's"), "{other:?}");
    }
    let foreign = Info { of_owner: 77, ..own };
    assert!(refused(foreign, Some(77)).contains("not this volume's"));
    assert!(refused(foreign, None).contains("not this volume's"));
    let others =
        [Info { depth: 64, ..own }, Info { max_request: 4096, ..own }, Info { queues: 2, ..own }];
    for other in others {
        assert!(refused(other, Some(77)).contains("another version"), "{other:?}");
    }
}
