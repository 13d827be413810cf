use super::*;

#[test]
fn sizes_are_read_with_their_units() {
    for (text, bytes) in
        [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("10GiB", 10 << 30), ("3 k", 3072)]
    {
        assert_eq!(parse_size(text), Some(bytes), "{text}");
    }
    for bad in ["", "M", "-1", "1.5G", "10 GB", "16777217T", "18446744073709551616"] {
        assert_eq!(parse_size(bad), None, "{bad}");
    }
    let mut tunables = Tunables::default();
    for (value, kib) in [("4096", 4096), ("4M", 4096), ("1GiB", 1 << 20), ("2048B", 2)] {
        tunables.set("sequential_cutoff", value).unwrap();
        assert_eq!(tunables.sequential_cutoff, kib, "{value}");
    }
    for bad in ["2G", "1B", "4X"] {
        let refused = tunables.set("sequential_cutoff", bad).unwrap_err().to_string();
        assert!(refused.ends_with("from 0 to 1048576 (KiB; or a size such as 4M)"), "{refused}");
    }
    assert!(
        tunables.set("sync_data_interval", "1K").unwrap_err().to_string().ends_with("to 3600 (s)")
    );
}

#[test]
fn every_tunable_keeps_what_it_is_set_to() {
    for definition in DEFINITIONS {
        let mut tunables = Tunables::default();
        assert_eq!((definition.get)(&tunables), definition.default, "{}", definition.key);
        for number in [*definition.range.start(), *definition.range.end()] {
            tunables.set(definition.key, &definition.value(number).to_string()).unwrap();
            assert_eq!((definition.get)(&tunables), number, "{}", definition.key);
        }
    }
}

#[test]
fn the_modules_name_for_a_mode_is_taken_and_strict_order_goes_with_no_way_around_the_log() {
    let mut tunables = Tunables::default();
    tunables.set_pair("write_around_mode=1").unwrap();
    assert_eq!(tunables.write_mode, WriteMode::Around);
    assert!(tunables.to_string().contains("write_mode=around") && tunables.check().is_ok());
    tunables.set_pair("writeback_order=strict").unwrap();
    let why = tunables.check().unwrap_err().to_string();
    assert!(why.contains("set write_mode=back first"), "{why}");
    tunables.set_pair("write_around_mode=0").unwrap();
    assert!(tunables.check().is_ok());
    tunables.sequential_cutoff = 1;
    assert!(tunables.check().is_err());
}

#[test]
fn unknown_keys_and_values_out_of_range_are_refused_by_name() {
    let mut tunables = Tunables::default();
    tunables.set_pair("nr_max_batched_writeback=1024").unwrap();
    assert!(tunables.to_string().contains("nr_max_batched_writeback=1024 writeback_order=sorted"));
    let message = |text| Tunables::default().set_pair(text).unwrap_err().to_string();
    assert_eq!(
        message("nr_max_batched_writeback=0"),
        "nr_max_batched_writeback=0: must be a number from 1 to 4096 (segments)"
    );
    assert_eq!(
        message("writeback_order=odd"),
        "writeback_order=odd: must be one of: sorted, strict"
    );
    assert!(
        message("colour=red").starts_with("unknown tunable 'colour'; known: writeback_threshold, ")
    );
    assert_eq!(message("colour"), "'colour': must be KEY=VALUE");
}
