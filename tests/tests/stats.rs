//! What a volume tells of its work, in each of the forms in which it is asked for.

use serde_json::Value;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use wb_tests::{MIB, Volume, needs_serving, noise};

/// Writes past the page cache, and makes it durable.
fn write(device: &Path, at: u64, bytes: u64) {
    let file = File::options()
        .write(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(device)
        .expect("a device");
    let data = libwb::device::IoBuf::copy_of(&noise(at, bytes));
    file.write_all_at(&data, at).and_then(|()| file.sync_all()).expect("a write");
}

fn statistics(volume: &Volume) -> Value {
    volume.status()["live"]["statistics"].clone()
}

/// How many whole blocks were written that the cache held, and that it did not hold.
fn written_blocks(volume: &Volume, hit: bool) -> u64 {
    let accesses = statistics(volume)["accesses"].as_array().expect("a list").clone();
    let is_meant =
        |met: &&Value| met["request"] == "write" && met["hit"] == hit && met["whole"] == true;
    accesses.iter().filter(is_meant).map(|met| met["blocks"].as_u64().expect("a number")).sum()
}

#[test]
fn status_says_what_requests_found_how_long_they_took_and_what_they_cost_the_cache_device() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    assert_eq!(statistics(&volume)["write_amplification"], Value::Null);
    write(&attached.device, 0, MIB);
    write(&attached.device, MIB / 2, MIB);
    assert_eq!((written_blocks(&volume, true), written_blocks(&volume, false)), (128, 384));
    let told = statistics(&volume);
    assert_eq!(told["write_hit_ratio"], 0.25);
    let amplification = told["write_amplification"].as_f64().unwrap();
    assert!((1.0..1.1).contains(&amplification), "{told}");
    let latency = &told["latencies"]["write"];
    assert_eq!(latency["requests"], volume.status()["live"]["counters"]["writes"]);
    let buckets = latency["buckets"].as_array().unwrap();
    assert_eq!(buckets.iter().filter_map(Value::as_u64).sum::<u64>(), latency["requests"]);
    let [p50, p999] = ["p50_seconds", "p999_seconds"].map(|share| latency[share].as_f64().unwrap());
    assert!(0.0 < p50 && p50 <= p999, "{told}");
    assert!(told["latencies"]["flush"]["requests"].as_u64() >= Some(2), "{told}");
    volume.must(&["drain", &volume.name]);
    assert!(statistics(&volume)["writeback_bytes_per_second"].as_f64() > Some(0.0));
    let shown = volume.must(&["status", &volume.name]);
    for line in [
        "25.0 % of those written",
        "bytes to the cache device per byte written",
        "/s while it works\n",
        "p99.9",
    ] {
        assert!(shown.contains(line), "{line}: {shown}");
    }
    attached.detach(&[]);
}

#[test]
fn counters_start_anew_when_told_to_and_nothing_else_changes() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&[]);
    write(&attached.device, 0, MIB);
    let before = volume.status();
    volume.must(&["clear-stats", &volume.name]);
    let after = volume.status();
    for what in ["write_bytes", "flushes", "segments_written", "cache_write_bytes"] {
        assert!(before["live"]["counters"][what].as_u64() > Some(0), "{what}: {before}");
        assert_eq!(after["live"]["counters"][what], 0);
    }
    assert_eq!(statistics(&volume)["latencies"]["write"]["requests"], 0);
    assert_eq!(after["live"]["newest_segment"], before["live"]["newest_segment"]);
    write(&attached.device, 0, MIB);
    assert_eq!(volume.status()["live"]["counters"]["write_bytes"], MIB);
    assert_eq!((written_blocks(&volume, true), written_blocks(&volume, false)), (256, 0));
    attached.detach(&[]);
    let refused = volume.wbctl(&["clear-stats", &volume.name]);
    assert!(refused.code == 1 && refused.stderr.contains("is not attached"), "{refused:?}");
}

/// The line of the kernel module, read as its readme describes it.
struct DmLine {
    /// Position, blocks, segments, current id, flushed id, written-back id, dirty blocks.
    log: Vec<u64>,
    accesses: Vec<u64>,
    partial: u64,
    tunables: Vec<(String, u64)>,
}

impl DmLine {
    fn parse(text: &str) -> DmLine {
        let line = text.strip_suffix('\n').expect("a line");
        let words: Vec<&str> = line.split(' ').collect();
        let numbers: Vec<u64> =
            words[..25].iter().map(|word| word.parse().expect("a number")).collect();
        let tunables: Vec<(String, u64)> = words[25..]
            .chunks(2)
            .map(|pair| (pair[0].into(), pair[1].parse().expect("a number")))
            .collect();
        assert_eq!(numbers[24], 2 * tunables.len() as u64, "{line}");
        DmLine {
            log: numbers[..7].into(),
            accesses: numbers[7..23].into(),
            partial: numbers[23],
            tunables,
        }
    }
}

#[test]
fn scripts_for_the_kernel_module_get_its_status_line() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    // Nothing is written back by itself.
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    let line = || DmLine::parse(&volume.must(&["status", "--dm", &volume.name]));
    let start = line().log[0];
    assert_eq!(line().log[1..], [8 * 127, 8, 1, 0, 0, 0]);
    write(&attached.device, 0, 130 * 4096);
    let now = line();
    // 127 blocks in a full segment, and three in the next, which the flush has not closed.
    assert_eq!(now.log[0], (start + 127 + 3) % (8 * 127));
    assert_eq!(now.log[1..], [8 * 127, 8, 2, 1, 0, 130]);
    // Bits, from the highest: written, cached before, in RAM, whole.
    assert_eq!((now.accesses[0b1001], now.partial), (130, 0));
    write(&attached.device, 0, 4096);
    let now = line();
    assert_eq!((now.accesses[0b1001], now.accesses[0b1101], now.partial), (130, 1, 0));
    assert!(now.tunables.contains(&("writeback_threshold".into(), 0)), "{:?}", now.tunables);
    assert!(
        now.tunables.iter().all(|(key, _)| key != "writeback_order"),
        "the module does not know that one"
    );
    attached.detach(&[]);
    let refused = volume.wbctl(&["status", "--dm", &volume.name]);
    assert!(refused.code == 3 && refused.stderr.contains("is not attached"), "{refused:?}");
    assert_eq!(volume.wbctl(&["status", "--dm"]).code, 2);
}

/// Lines of `wbctl stat`, each as pairs of a column's name and what it says.
fn stat(volume: &Volume, more: &[&str]) -> Vec<Vec<(String, String)>> {
    let text = volume.must(&[&["stat", &volume.name], more].concat());
    let mut lines = text.lines().map(|line| line.split_whitespace().map(String::from));
    let columns: Vec<String> = lines.next().expect("a header").collect();
    let lines: Vec<Vec<(String, String)>> =
        lines.map(|line| columns.iter().cloned().zip(line).collect()).collect();
    assert!(lines.iter().all(|line| line.len() == columns.len()), "{text}");
    lines
}

fn cell(line: &[(String, String)], column: &str) -> Option<f64> {
    line.iter().find(|(name, _)| name == column).expect(column).1.parse().ok()
}

#[test]
fn stat_prints_a_line_for_all_time_or_for_each_interval() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    write(&attached.device, 0, MIB);
    let [all] = &stat(&volume, &[])[..] else { panic!("more than a line") };
    assert!(cell(all, "wMiB/s") > Some(0.0) && cell(all, "w99us") >= cell(all, "w50us"), "{all:?}");
    // A full segment, one of 127 blocks, and the rest.
    assert_eq!(cell(all, "log%"), Some(37.5));
    let idle = stat(&volume, &["0.05", "3"]);
    assert_eq!(idle.len(), 3);
    for line in &idle {
        assert_eq!(
            (cell(line, "w/s"), cell(line, "w50us"), cell(line, "f/s")),
            (Some(0.0), None, Some(0.0))
        );
    }
    for (interval, code) in [("0", 2), ("-1", 2), ("nan", 2), ("1e99", 2)] {
        assert_eq!(volume.wbctl(&["stat", &volume.name, "--", interval]).code, code, "{interval}");
    }
    attached.detach(&[]);
    let refused = volume.wbctl(&["stat", &volume.name]);
    assert!(refused.code == 1 && refused.stderr.contains("is not attached"), "{refused:?}");
}

#[test]
fn metrics_for_prometheus_are_in_its_text_format_and_tell_of_detached_volumes() {
    needs_serving!();
    let volume = Volume::created(8, 8 * MIB);
    let name = volume.name.as_str();
    let attached = volume.attach_with(&["writeback_threshold=0"]);
    write(&attached.device, 0, MIB);
    let text = volume.must(&["status", "--prometheus", name]);
    let mut typed = String::new();
    let page = include_str!("../../manual/src/wbctl.roff");
    for line in text.lines() {
        if let Some(line) = line.strip_prefix("# ") {
            let words: Vec<&str> = line.splitn(3, ' ').collect();
            assert!(matches!(words[0], "HELP" | "TYPE") && words.len() == 3, "{line}");
            typed = words[1].into();
            let counter = typed.strip_prefix("wb_").and_then(|name| name.strip_suffix("_total"));
            let is_written = [Some(typed.as_str()), counter]
                .into_iter()
                .flatten()
                .any(|name| page.contains(name));
            assert!(is_written, "{typed} is not in wbctl.roff");
            continue;
        }
        let (metric, value) = line.rsplit_once(' ').expect("a value");
        let (metric, labels) = metric.split_once('{').expect("labels");
        assert!(
            metric.starts_with(&typed) && metric.starts_with("wb_"),
            "{line} is not of {typed}"
        );
        assert!(
            labels.starts_with(&format!("volume=\"{name}\"")) && labels.ends_with("\"}"),
            "{line}"
        );
        assert!(value.parse::<f64>().is_ok_and(|value| value >= 0.0), "{line}");
    }
    let has = |line: String| assert!(text.lines().any(|found| found == line), "{line}: {text}");
    has(format!("wb_attached{{volume=\"{name}\"}} 1"));
    has(format!("wb_dirty_bytes{{volume=\"{name}\"}} {MIB}"));
    has(format!("wb_write_bytes_total{{volume=\"{name}\"}} {MIB}"));
    has("# TYPE wb_write_bytes_total counter".into());
    let whole = "request=\"write\",hit=\"false\",in_ram=\"false\",whole=\"true\"";
    has(format!("wb_blocks_total{{volume=\"{name}\",{whole}}} 256"));
    let writes = volume.status()["live"]["counters"]["writes"].clone();
    has(format!(
        "wb_request_seconds_bucket{{volume=\"{name}\",request=\"write\",le=\"+Inf\"}} {writes}"
    ));
    has(format!("wb_request_seconds_count{{volume=\"{name}\",request=\"write\"}} {writes}"));
    attached.detach(&[]);
    let detached = volume.must(&["status", "--prometheus"]);
    assert!(detached.contains(&format!("wb_attached{{volume=\"{name}\"}} 0\n")), "{detached}");
    assert!(!detached.contains("wb_dirty_bytes{"), "{detached}");
}

#[test]
fn promtool_is_content_with_the_metrics() {
    needs_serving!("promtool");
    let volume = Volume::created(8, 8 * MIB);
    let check = |metrics: &str| {
        let mut promtool = Command::new("promtool")
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("promtool");
        promtool.stdin.take().expect("a pipe").write_all(metrics.as_bytes()).expect("a reader");
        let output = promtool.wait_with_output().expect("promtool");
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success() && said.is_empty(), "{}", String::from_utf8_lossy(&said));
    };
    let metrics = || volume.must(&["status", "--prometheus"]);
    check(&metrics());
    let mut attached = volume.attach_with(&[]);
    write(&attached.device, 0, MIB);
    volume.must(&["drain", &volume.name]);
    check(&metrics());
    attached.kill();
    check(&metrics());
}
