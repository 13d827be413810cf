//! What wb depends on has a licence that deny.toml allows, and all of it comes from one registry.

use serde_json::Value;
use spdx::{Expression, ParseMode};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

fn allowed() -> BTreeSet<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deny.toml");
    let rules: toml::Table =
        std::fs::read_to_string(path).expect("deny.toml").parse().expect("TOML");
    let allow = rules["licenses"]["allow"].as_array().expect("a list");
    allow.iter().map(|licence| licence.as_str().expect("a licence").to_string()).collect()
}

/// All packages that are built, by the lock file, without the network.
fn packages() -> Vec<Value> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--offline", "--locked", "--format-version", "1", "--all-features"])
        .args(["--filter-platform", &target])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    metadata["packages"].as_array().expect("a list").clone()
}

#[test]
fn every_dependency_has_a_licence_that_is_allowed_and_comes_from_the_one_registry() {
    let allowed = allowed();
    let mut needed = BTreeSet::new();
    let packages = packages();
    let mut sources = BTreeSet::new();
    assert!(packages.len() > 100, "{}", packages.len());
    for package in &packages {
        let name = &package["name"];
        let Some(licence) = package["license"].as_str() else { panic!("{name} names no licence") };
        let licence = Expression::parse_mode(licence, ParseMode::LAX)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut is_allowed = |wanted: &spdx::LicenseReq| {
            let wanted = wanted.to_string();
            let is_allowed = allowed.contains(&wanted);
            if is_allowed {
                needed.insert(wanted);
            }
            is_allowed
        };
        assert!(
            licence.evaluate(&mut is_allowed),
            "{name}: {licence} is not among those of deny.toml"
        );
        sources.extend(package["source"].as_str());
    }
    let is_one_registry =
        sources.len() == 1 && sources.iter().all(|source| source.starts_with("registry+"));
    assert!(is_one_registry, "{sources:?}");
    assert_eq!(needed, allowed, "deny.toml allows what nothing needs");
}
