//! What kernel modules depend on, read from their ELF sections, and the order of loading.
#![no_main]
#![allow(
    dead_code,
    reason = "the parser's file has more than this target calls"
)]

#[path = "../../crates/image/src/module.rs"]
mod module;

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;

// Read twice: as a module, and as a graph in which each four bytes are a name and its needs.
fuzz_target!(|data: &[u8]| {
    if let Ok(names) = module::dependencies(data) {
        assert!(
            names
                .iter()
                .all(|name| !name.is_empty() && !name.contains(['-', ',']))
        );
    }
    let name = |number: &u8| format!("m{number}");
    let direct: BTreeMap<String, Vec<String>> = data
        .chunks(4)
        .filter_map(|chunk| chunk.split_first())
        .map(|(one, needs)| (name(one), needs.iter().map(name).collect()))
        .collect();
    let wanted: Vec<&str> = direct.keys().map(String::as_str).collect();
    let order = module::load_order(&wanted, &direct);
    // Each once, and all of them.
    let mut sorted = order.clone();
    sorted.sort();
    sorted.dedup();
    assert_eq!((sorted.len(), order.len()), (direct.len(), direct.len()));
});
