//! How the source is laid out: no modules use each other in a circle, the arrows within libwb
//! point down, and no line is too long.
//!
//! `WB_SHOW_MODULES=1` prints all arrows.

mod graph;

use graph::{Arrows, Crate, Module, circles};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use wb_tests::{skip, system};

const PACKAGES: [&str; 6] = ["libwb", "wbctl", "wbformat", "wbcheck", "wbdump", "manual"];

/// The layers of libwb from the bottom up, and which others each may use. A row for a module within
/// a layer adds to what the layer may use.
const LAYERS: [(&str, &[&str]); 18] = [
    ("folders", &[]),
    ("format", &[]),
    ("buf", &["format"]),
    ("nbd", &["format"]),
    ("rules", &[]),
    ("pending", &["format"]),
    ("runtime", &["format"]),
    ("sys", &["format"]),
    ("reactor", &["buf", "format", "pending", "runtime", "sys"]),
    ("device", &["buf", "format", "nbd", "pending", "rules", "runtime", "sys"]),
    ("device::uring", &["reactor"]),
    ("device::nbd::dial", &["reactor"]),
    ("log", &["buf", "device", "format", "rules", "runtime", "sys"]),
    ("cache", &["buf", "device", "format", "log", "rules", "runtime", "sys"]),
    (
        "control",
        &["buf", "cache", "device", "folders", "format", "log", "pending", "runtime", "sys"],
    ),
    ("serve", &["buf", "cache", "device", "format", "log", "reactor", "runtime", "sys"]),
    ("serve::nbd", &["nbd"]),
    (
        "cli",
        &[
            "buf", "cache", "control", "device", "folders", "format", "log", "nbd", "reactor",
            "runtime", "serve", "sys",
        ],
    ),
];

const MOST_COLUMNS: usize = 100;
/// Kinds of files whose lines are counted.
const KINDS: [&str; 8] = ["rs", "md", "roff", "5", "7", "sh", "py", "toml"];
/// Why a line of a file may be longer, and whether that holds for it.
type Exception = (&'static str, fn(&str, &str) -> bool);
const LONGER: [Exception; 2] = [
    ("a row of a table cannot be broken", |file, line| {
        file.ends_with(".md") && line.starts_with('|')
    }),
    ("an address cannot be broken", |_, line| {
        line.split_whitespace().any(|word| word.contains("://") && word.len() > MOST_COLUMNS / 2)
    }),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_path_buf()
}

fn shown(modules: &BTreeSet<Module>) -> String {
    modules.iter().map(|module| module.join("::")).collect::<Vec<_>>().join(", ")
}

fn arrows_of(package: &str) -> Arrows {
    let arrows = Crate::read(&root().join(package)).arrows();
    if std::env::var_os("WB_SHOW_MODULES").is_some() {
        for (module, used) in &arrows {
            println!("{package}::{} -> {}", module.join("::"), shown(used));
        }
    }
    arrows
}

#[test]
fn no_modules_use_each_other_in_a_circle() {
    let mut found = Vec::new();
    for package in PACKAGES {
        let circles = circles(&arrows_of(package));
        found.extend(circles.iter().map(|circle| format!("{package}: {}", shown(circle))));
    }
    assert!(found.is_empty(), "circles:\n{}", found.join("\n"));
}

#[test]
fn within_libwb_the_arrows_point_down() {
    let may_use = |module: &str, other: &str| {
        let is_within = |layer: &str| {
            module.strip_prefix(layer).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        };
        LAYERS.iter().any(|(layer, below)| is_within(layer) && below.contains(&other))
    };
    let (mut seen, mut wrong) = (BTreeSet::new(), Vec::new());
    for (module, used) in arrows_of("libwb") {
        for other in used {
            let (Some(from), Some(to)) = (module.first(), other.first()) else { continue };
            let (module, other) = (module.join("::"), other.join("::"));
            if from != to && !may_use(&module, to) {
                wrong.push(format!("{module} uses {other}, but {from} may not use {to}"));
            }
            seen.insert((from.clone(), to.clone()));
        }
    }
    assert!(seen.contains(&("cache".into(), "log".into())), "{seen:?} lacks a known arrow");
    assert!(wrong.is_empty(), "LAYERS in {} says:\n{}", file!(), wrong.join("\n"));
}

#[test]
fn no_line_is_longer_than_100_columns() {
    let root = root();
    let Some(files) = system("git", &["-C", root.to_str().expect("UTF-8"), "ls-files"]) else {
        skip!("needs git and a checkout")
    };
    let is_counted = |file: &&str| KINDS.iter().any(|kind| file.ends_with(&format!(".{kind}")));
    let (mut lines, mut long) = (0, Vec::new());
    // A file that is tracked may have been removed since.
    for file in files.lines().filter(is_counted).filter(|file| root.join(file).exists()) {
        let text = std::fs::read_to_string(root.join(file)).expect("a text in UTF-8");
        for (number, line) in (1..).zip(text.lines()) {
            lines += 1;
            let columns = line.chars().count();
            if columns > MOST_COLUMNS && !LONGER.iter().any(|(_, may)| may(file, line)) {
                long.push(format!("{file}:{number}: {columns} columns"));
            }
        }
    }
    assert!(lines > 10_000, "only {lines} lines were seen");
    assert!(long.is_empty(), "{} lines are too long:\n{}", long.len(), long.join("\n"));
}

#[test]
fn no_build_output_is_tracked() {
    let root = root();
    let Some(files) = system("git", &["-C", root.to_str().expect("UTF-8"), "ls-files"]) else {
        skip!("needs git and a checkout")
    };
    assert!(files.lines().any(|file| file == "Cargo.toml"), "{files}");
    // cargo puts this file into each folder that it builds in.
    let built: Vec<&str> = files.lines().filter(|file| file.ends_with("CACHEDIR.TAG")).collect();
    assert!(built.is_empty(), "{built:?}");
}

fn arrows_in(text: &str) -> Vec<(String, String)> {
    let arrows = Crate::parse(text).arrows();
    let pairs = arrows
        .iter()
        .flat_map(|(module, used)| used.iter().map(|other| (module.join("::"), other.join("::"))));
    pairs.collect()
}

#[test]
fn every_kind_of_arrow_is_seen() {
    let one =
        |user: &str| arrows_in(&format!("mod to {{ pub struct It; pub fn it() {{}} }} {user}"));
    for user in [
        "mod from { use crate::to::It; }",
        "mod from { use super::to::{self, It as Other}; }",
        "mod from { pub use crate::to::It; }",
        "mod from { fn f() { use crate::to; } }",
        "mod from { fn f() { crate::to::it() } }",
        "mod from { fn f(it: Vec<super::to::It>) {} }",
        "mod from { fn f() { println!(\"{}\", crate::to::it()) } }",
        "mod from { macro_rules! m { () => { $crate::to::it() } } }",
        "mod from { #[arg(value_parser = crate::to::it)] struct S; }",
        "mod from { impl S { fn f() { [1].map(crate::to::it); } } struct S; }",
    ] {
        assert_eq!(one(user), [("from".into(), "to".into())], "{user}");
    }
    let inner = "mod from { mod inner { fn f() { super::super::to::it() } } }";
    assert_eq!(one(inner), [("from::inner".into(), "to".into())]);
}

#[test]
fn a_name_that_is_re_exported_leads_to_where_it_is_defined() {
    let text = "mod hub { mod inner { pub struct It; } pub use inner::It; pub use other::*;
                    mod other { pub fn f() {} } }
                mod a { use crate::hub::It; }
                mod b { fn g() { crate::hub::f() } }
                mod c { use crate::hub::*; fn g(it: It) {} }";
    let pairs = [("a", "hub::inner"), ("b", "hub::other"), ("c", "hub"), ("c", "hub::inner")];
    assert_eq!(arrows_in(text), pairs.map(|(from, to)| (from.to_string(), to.to_string())));
}

#[test]
fn no_arrow_is_invented() {
    let text = "mod a { use b::X; fn f() { let c = 1; ::c::g(c); \"crate::b::X\"; } }
                mod b { pub struct X; }
                mod c { pub fn g() {} #[cfg(test)] use crate::a::f; #[cfg(test)] mod tests {
                    use crate::a::f; } struct S; impl S { #[cfg(test)] fn t() { crate::b::X } } }
                mod d { pub(in crate::a) struct S; use crc::crc; }";
    assert_eq!(arrows_in(text), []);
}

#[test]
fn circles_are_found() {
    let text = "mod a { use crate::b::X; } mod b { use crate::c::X; } mod c { use crate::a::X; }
                mod d { use crate::a::X; } mod e { mod f { use super::X; } use f::Y; }";
    let found: Vec<String> = circles(&Crate::parse(text).arrows()).iter().map(shown).collect();
    assert_eq!(found, ["a, b, c", "e, e::f"]);
    assert!(circles(&Crate::parse("mod a { use crate::b::X; } mod b {}").arrows()).is_empty());
}
