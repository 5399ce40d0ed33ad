//! Orders for a page server: what passes means the same after it was written again.

use wrenn_memory::Config;

/// The JSON.
pub fn check(data: &[u8]) {
    let Ok(config) = Config::read(data) else {
        return;
    };
    let recorded = config.policy.record.is_some();
    assert!(!recorded || config.policy.working_set.is_some());
    let text = serde_json::to_vec(&config).expect("it is JSON");
    // Escapes may make it longer than it may be.
    if let Ok(again) = Config::read(&text[..]) {
        assert_eq!(again, config);
    }
}
