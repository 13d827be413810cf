//! Compares what the programs say of a device with the verdict in this process.

use super::{Verdict, checked, device};
use futures_lite::future::block_on;
use libwb::log::Use;
use libwb::log::salvage::{SalvageMode, Scanned};
use libwb::log::scan::{SlotState, scan, scan_headers};
use libwb::log::superblock::examine_superblock;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use wb_tests::damage_script::VOLUME_BYTES;
use wb_tests::{Outcome, run, zeros};

/// The files of a device that the programs read.
struct Files {
    dir: TempDir,
    cache: PathBuf,
    backing: PathBuf,
}

impl Files {
    fn of(image: &[u8]) -> Files {
        let dir = TempDir::new().expect("a temporary folder");
        let (cache, backing) = (dir.path().join("cache"), zeros(&dir, "backing", VOLUME_BYTES));
        std::fs::write(&cache, image).expect("room for an image");
        Files { dir, cache, backing }
    }

    fn run(&self, program: &str, args: &[&str]) -> Outcome {
        run(program, args.iter().map(OsStr::new).chain([self.cache.as_os_str()]))
    }

    fn replay(&self, cache: &Path, backing: &Path, option: &str) -> Outcome {
        let devices =
            ["--cache".as_ref(), cache.as_os_str(), "--backing".as_ref(), backing.as_os_str()];
        run("wbctl", ["replay", "--json", option].map(OsStr::new).into_iter().chain(devices))
    }
}

/// Compares what the programs say of a device with what was found in this process.
pub(super) fn compare_programs(image: &[u8]) -> Result<(), String> {
    let files = Files::of(image);
    let backing = files.backing.to_str().expect("a path in UTF-8");
    let check = files.run("wbcheck", &["--json", "--backing", backing]);
    let cache = device(image);
    let verdict = checked(&cache, &block_on(Scanned::read(&cache, Use::Read, |_| ())));
    let dry = files.replay(&files.cache, &files.backing, "--dry-run");
    if check.code == 8 {
        let refused = verdict == Verdict::Refused && dry.code == 1;
        return if refused { Ok(()) } else { Err(format!("wbcheck: {check:?}; replay: {dry:?}")) };
    }
    let json = check.json();
    let is_corrupt = json["verdict"] == "corrupt";
    let says = |what: &str, json: &Value, names: [&str; 3]| -> Result<(), String> {
        let found = names.map(|name| json[name].clone());
        match &verdict {
            Verdict::Kept { point, live, dirty_blocks } => {
                let wanted = [json!(point), json!(live.len()), json!(dirty_blocks)];
                if found == wanted {
                    Ok(())
                } else {
                    Err(format!("{what}: {found:?}; wanted {wanted:?}"))
                }
            }
            Verdict::Refused => Ok(()),
        }
    };
    if is_corrupt != (verdict == Verdict::Refused) || is_corrupt != (dry.code != 0) {
        return Err(format!("{verdict:?}; wbcheck: {check:?}; replay: {dry:?}"));
    }
    says("wbcheck", &json, ["recovery_point", "live_segments", "dirty_blocks"])?;
    if !is_corrupt {
        says("replay", &dry.json(), ["recovery_point", "segments", "dirty_blocks"])?;
    }
    let shown = files.run("wbdump", &["super", "--json"]).json();
    says("wbdump super", &shown, ["recovery_point", "live_segments", "dirty_blocks"])?;
    for name in [
        "recovery_point",
        "live_segments",
        "newest_segment",
        "written_back_segment",
        "slots_damaged",
    ] {
        if shown[name] != json[name] {
            return Err(format!("{name}: wbdump {}, wbcheck {}", shown[name], json[name]));
        }
    }
    compare_live(&files, &json)?;
    compare_each_segment(&files, image, &json)?;
    if is_corrupt { compare_replays(&files, &json) } else { Ok(()) }
}

/// wbdump lists the segments that wbcheck counts as live.
fn compare_live(files: &Files, check: &Value) -> Result<(), String> {
    let listed = files.run("wbdump", &["segments", "--live", "--json"]);
    let ids = listed
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).expect("JSON")["id"].as_u64());
    let ids: Vec<Option<u64>> = ids.collect();
    let point = check["recovery_point"].as_u64().unwrap_or_default();
    let count = check["live_segments"].as_u64().unwrap_or_default();
    let wanted: Vec<Option<u64>> = (point + 1 - count..=point).map(Some).collect();
    if ids == wanted {
        Ok(())
    } else {
        Err(format!("wbdump lists {ids:?} as live, wbcheck {wanted:?}"))
    }
}

/// wbdump describes a slot in the same way if asked for one segment alone. It then reads only the
/// headers of the others. So if their data is rotten, the log may end elsewhere, and a damaged slot
/// may have another explanation.
fn compare_each_segment(files: &Files, image: &[u8], check: &Value) -> Result<(), String> {
    let number = |name: &str| check[name].as_u64().unwrap_or_default();
    let [newest, point, written_back] =
        ["newest_segment", "recovery_point", "written_back_segment"].map(number);
    let damage = check["damage"].as_array().expect("a list");
    let damaged = damage.iter().filter_map(|damage| damage["expected_segment"].as_u64());
    let ids: BTreeSet<u64> =
        damaged.chain([1, written_back, point, point + 1, newest]).filter(|id| *id > 0).collect();
    for id in ids {
        let one = files.run("wbcheck", &["--json", "--segment", &id.to_string()]);
        let verdict =
            if one.code == 8 { json!("not there") } else { one.json()["verdict"].clone() };
        let slot = (id - 1) % number("slots");
        let of_slot = damage.iter().find(|damage| damage["slot"] == slot);
        let is_any = |verdicts: &[&str]| verdicts.iter().any(|one| verdict == *one);
        let agrees = match of_slot.and_then(|damage| damage["explanation"].as_str()) {
            Some("unexplained") => is_any(&["corrupt"]),
            Some(_) if is_data_rotten_elsewhere(image, slot) => !is_any(&["sound", "not there"]),
            Some("power-cut") => is_any(&["sound-after-power-cut"]),
            Some(_) => is_any(&["damaged"]),
            None if id <= written_back => is_any(&["sound", "not there"]),
            None if id <= point => is_any(&["sound", "sound-after-power-cut"]),
            // After a gap that no power cut explains, the slot may be sound, or be the gap.
            None if check["verdict"] == "corrupt" => true,
            None => is_any(&["sound-after-power-cut", "not there"]),
        };
        if !agrees {
            return Err(format!(
                "segment {id}: wbcheck --segment says {verdict}, wbcheck {of_slot:?}"
            ));
        }
    }
    Ok(())
}

/// Whether the headers of the other slots hide some damage.
fn is_data_rotten_elsewhere(image: &[u8], but: u64) -> bool {
    let cache = device(image);
    let geometry = block_on(examine_superblock(&cache)).expect("a superblock").geometry;
    let whole = block_on(scan(&cache, geometry, |_, _| ()));
    let headers = block_on(scan_headers(&cache, geometry, |_, _| ()));
    let differs =
        |(whole, header): (&SlotState, &SlotState)| format!("{whole:?}") != format!("{header:?}");
    (0..).zip(whole.iter().zip(&headers)).any(|(slot, states)| slot != but && differs(states))
}

fn is_same_but_for_the_name(one: &Value, other: &Value) -> bool {
    let mut renamed = other.clone();
    renamed["way"] = one["way"].clone();
    *one == renamed
}

/// How many lost blocks wbcheck reports in a cache.
fn lost_blocks(cache: &Path) -> usize {
    let found = run("wbcheck", ["--json".as_ref(), cache.as_os_str()]);
    assert_eq!(
        (found.code, found.json()["verdict"].clone()),
        (4, "blocks-lost".into()),
        "{found:?}"
    );
    found.json()["lost_blocks"].as_array().map_or(0, Vec::len)
}

/// replay takes each way that wbcheck offers, and reports the same about it.
fn compare_replays(files: &Files, check: &Value) -> Result<(), String> {
    let ways = check["salvage"].as_array().expect("a list");
    for way in SalvageMode::ALL {
        let plan = ways.iter().find(|plan| plan["way"] == way.to_string());
        let (cache, backing) =
            (files.dir.path().join("copy"), zeros(&files.dir, "other", VOLUME_BYTES));
        std::fs::copy(&files.cache, &cache).expect("room for an image");
        let done = files.replay(&cache, &backing, &format!("--salvage={way}"));
        match plan {
            Some(plan) if done.code == 0 && done.json()["salvage"] == *plan => {}
            // What is kept does not fit.
            Some(_) if done.stderr.contains("holds data for sector") => {}
            // A lost block stays in the cache, and wbcheck reports it, too.
            Some(_)
                if done.code == 1
                    && done.stderr.contains("cannot be read from the cache device any more")
                    && lost_blocks(&cache) > 0 => {}
            None if done.code != 0 => {}
            // It is the same as the other.
            None if ways
                .iter()
                .any(|plan| is_same_but_for_the_name(plan, &done.json()["salvage"])) => {}
            _ => return Err(format!("--salvage={way}: wbcheck plans {plan:?}, replay: {done:?}")),
        }
    }
    Ok(())
}
