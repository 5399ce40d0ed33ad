//! What the repository promises about itself: which dependencies it may have, and that
//! `docs/guarantees.md` names the tests that there are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use wrenn_e2e::repository;

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn cargo(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(arguments)
        .current_dir(repository())
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Everything that is compiled for the one target we build for.
fn packages() -> Vec<Value> {
    let metadata = cargo(&[
        "metadata",
        "--format-version",
        "1",
        "--locked",
        "--filter-platform",
        TARGET,
    ]);
    let metadata: Value = serde_json::from_slice(&metadata).expect("JSON");
    metadata["packages"].as_array().expect("packages").clone()
}

/// Each package that these kinds of dependencies lead to, and with which features.
fn features(kinds: &str) -> BTreeSet<(String, String)> {
    let tree = cargo(&[
        "tree",
        "--workspace",
        "--locked",
        "--target",
        TARGET,
        "--edges",
        kinds,
        "--prefix",
        "none",
        "--no-dedupe",
        "--format",
        "{p}\t{f}",
    ]);
    let tree = String::from_utf8(tree).expect("UTF-8");
    let lines = tree.lines().filter_map(|line| line.split_once('\t'));
    lines
        .map(|(package, features)| (package.to_owned(), features.to_owned()))
        .collect()
}

/// A feature that only a test's dependency asks for has the package, and all that is built on
/// it, compiled once more for `cargo test`: what is tested would not be what runs.
#[test]
fn tests_have_dependencies_compiled_as_what_is_installed_has() {
    let installed = features("normal,build");
    let packages: BTreeSet<&String> = installed.iter().map(|(package, _)| package).collect();
    let mut tested = features("normal,build,dev");
    tested.retain(|(package, _)| packages.contains(package));
    let differing: Vec<_> = tested.symmetric_difference(&installed).collect();
    assert!(differing.is_empty(), "{differing:#?}");
}

fn rules() -> toml::Table {
    let text = fs::read_to_string(repository().join("deny.toml")).expect("deny.toml");
    text.parse().expect("deny.toml is TOML")
}

fn texts<'a>(rules: &'a toml::Table, section: &str, key: &str) -> Vec<&'a str> {
    let list = rules[section][key].as_array().expect("a list");
    let text = |value: &'a toml::Value| {
        value
            .as_str()
            .or_else(|| value["name"].as_str())
            .expect("a text")
    };
    list.iter().map(text).collect()
}

#[test]
fn every_dependency_has_a_licence_that_is_allowed() {
    let rules = rules();
    let allowed = texts(&rules, "licenses", "allow");
    let allows =
        |requirement: &spdx::LicenseReq| allowed.contains(&requirement.to_string().as_str());
    for package in packages() {
        let name = &package["name"];
        let text = package["license"]
            .as_str()
            .unwrap_or_else(|| panic!("{name} states no licence"));
        let licence = spdx::Expression::parse_mode(text, spdx::ParseMode::LAX)
            .unwrap_or_else(|error| panic!("{name}: {text}: {error}"));
        assert!(
            licence.evaluate(allows),
            "{name} is under {text}, which deny.toml does not allow"
        );
    }
}

#[test]
fn every_dependency_comes_from_the_registry_and_none_is_banned() {
    let rules = rules();
    let registries = texts(&rules, "sources", "allow-registry");
    let banned = texts(&rules, "bans", "deny");
    let packages = packages();
    assert!(
        packages.len() > 100,
        "cargo named only {} packages",
        packages.len()
    );
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        assert!(!banned.contains(&name), "{name} is banned in deny.toml");
        let Some(source) = package["source"].as_str() else {
            continue;
        };
        let known = registries
            .iter()
            .any(|registry| source == format!("registry+{registry}"));
        assert!(known, "{name} comes from {source}");
    }
}

/// The last number of the list of guarantees.
const LAST: u32 = 44;

/// Names of tests in a file that begin with a guarantee's number, by that number.
fn guarantees_in(text: &str) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some((keyword, after)) = ["fn g", "def test_g"]
        .iter()
        .filter_map(|keyword| {
            rest.find(keyword)
                .map(|at| (at + keyword.len() - 1, &rest[at + keyword.len()..]))
        })
        .min_by_key(|(at, _)| *at)
    {
        let digits: String = after.chars().take_while(char::is_ascii_digit).collect();
        let word = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
        let name: String = rest[keyword..].chars().take_while(word).collect();
        if let (Ok(number), true) = (digits.parse(), after[digits.len()..].starts_with('_')) {
            found.push((number, name));
        }
        rest = after;
    }
    found
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    let entries =
        fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    for entry in entries.map(|entry| entry.expect("an entry")) {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path
            .extension()
            .is_some_and(|ext| ext == "rs" || ext == "py")
        {
            found.push(path);
        }
    }
}

/// The table of `docs/guarantees.md`, as it should be.
fn table() -> String {
    let root = repository().canonicalize().expect("the repository");
    let mut files = Vec::new();
    for folder in ["crates", "tests"] {
        sources(&root.join(folder), &mut files);
    }
    let mut rows: BTreeMap<u32, BTreeSet<(String, String)>> =
        (1..=LAST).map(|n| (n, BTreeSet::new())).collect();
    for file in files {
        let text =
            fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let place = file
            .strip_prefix(&root)
            .expect("inside the repository")
            .display()
            .to_string();
        for (number, name) in guarantees_in(&text) {
            rows.entry(number)
                .or_default()
                .insert((place.clone(), name));
        }
    }
    let mut table = String::from("| guarantee | tests |\n|---|---|\n");
    for (number, tests) in rows {
        let tests: Vec<_> = tests
            .iter()
            .map(|(place, name)| format!("`{name}` ({place})"))
            .collect();
        let tests = if tests.is_empty() {
            "not proved yet".to_owned()
        } else {
            tests.join("<br>")
        };
        table += &format!("| G{number} | {tests} |\n");
    }
    table
}

#[test]
fn the_table_of_guarantees_names_the_tests_there_are() {
    let path = repository().join("docs/guarantees.md");
    let text = fs::read_to_string(&path).expect("docs/guarantees.md");
    let start = text
        .find("| guarantee |")
        .expect("docs/guarantees.md has the table");
    let right = format!("{}{}", &text[..start], table());
    if std::env::var_os("WRENN_UPDATE_DOCS").is_some() {
        fs::write(&path, right).expect("docs/guarantees.md can be written");
        return;
    }
    assert!(
        text == right,
        "docs/guarantees.md is behind the tests: `make guarantees` renews it"
    );
}

#[test]
fn only_names_with_a_number_are_guarantees() {
    // Put together here, so that this file itself proves nothing.
    let text = [
        "fn ",
        "g07_a() {} fn ",
        "get_b() fn ",
        "g1x() async fn ",
        "g35_c_d() def test_",
        "g2_e():",
    ]
    .concat();
    let found = guarantees_in(&text);
    assert_eq!(
        found,
        [
            (7, "g07_a".to_owned()),
            (35, "g35_c_d".to_owned()),
            (2, "g2_e".to_owned())
        ]
    );
}
