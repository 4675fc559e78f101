//! Laws of the gateway's plain values, tried on made-up input. `PROPTEST_CASES` makes a longer run of it.

use std::collections::BTreeMap;

use fanlight_api::{
    SessionId, ShareId,
    gateway::{ScreenPatch, SharePost},
};
use proptest::{collection::vec, prelude::*};

use crate::{
    config::Config,
    geoip::{Network, client_address},
    settings::{self, Settings},
    shares,
    token::{self, Macaroon, ShareGrant, SocketGrant},
};

const NOW: i64 = 1_800_000_000;

fn cases() -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(2000);
    ProptestConfig::with_cases(cases)
}

fn ids() -> impl Strategy<Value = String> {
    "[A-Za-z0-9_:-]{1,40}"
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn made_up_tokens_are_refused_and_break_nothing(text in ".{0,120}", bytes in vec(any::<u8>(), 0..120)) {
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
        let key = token::account_key(b"root", b"salt");
        for text in [text, URL_SAFE_NO_PAD.encode(&bytes), URL_SAFE_NO_PAD.encode([&[2], &bytes[..]].concat())] {
            if let Ok(macaroon) = Macaroon::parse(&text) {
                prop_assert!(token::check_api_token(&macaroon, &key, NOW).is_err());
                prop_assert!(SocketGrant::check(&macaroon, &key, NOW).is_err());
                prop_assert!(ShareGrant::check(&macaroon, &key, NOW).is_err());
                prop_assert!(token::check_share_token(&macaroon, &key).is_err());
            }
        }
    }

    #[test]
    fn a_token_that_was_changed_anywhere_opens_nothing(name in ids(), at in any::<prop::sample::Index>(), bit in 0..8_u8, cut in any::<prop::sample::Index>()) {
        use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
        let key = token::account_key(b"root", b"salt");
        let valid = token::api_token(&key, &name, Some(NOW + 60));
        let opens = |text: &str| {
            Macaroon::parse(text).is_ok_and(|macaroon| {
                macaroon.identifier() == name && token::check_api_token(&macaroon, &key, NOW).is_ok()
            })
        };
        prop_assert!(opens(&valid));
        let mut bytes = URL_SAFE_NO_PAD.decode(&valid).expect("base64");
        let index = at.index(bytes.len());
        bytes[index] ^= 1 << bit;
        // The location is not signed in this form of token; a changed one is another kind and so refused elsewhere.
        let changed = URL_SAFE_NO_PAD.encode(&bytes);
        let another_kind = Macaroon::parse(&changed).is_ok_and(|macaroon| macaroon.kind() != Some(token::Kind::Api));
        prop_assert!(another_kind || !opens(&changed), "byte {index} bit {bit}");
        bytes[index] ^= 1 << bit;
        prop_assert!(!opens(&URL_SAFE_NO_PAD.encode(&bytes[..cut.index(bytes.len())])));
    }

    #[test]
    fn socket_tokens_carry_what_was_put_in(
        id in ids(), generation in any::<u64>(), expires_at in NOW + 1..253_402_300_799_i64, page in any::<bool>(),
        width in any::<Option<i64>>(), fps in any::<Option<i64>>(), screened in any::<bool>(),
    ) {
        let key = token::socket_key(b"root");
        let screen = screened.then_some(ScreenPatch { width, fps, ..ScreenPatch::default() });
        let session_id: SessionId = id.parse().expect("an id");
        let grant = SocketGrant { session_id, generation, expires_at, screen, page };
        let macaroon = Macaroon::parse(&grant.to_token(&key)).expect("ours");
        prop_assert_eq!(SocketGrant::check(&macaroon, &key, NOW), Ok(grant));
        prop_assert!(SocketGrant::check(&macaroon, &key, expires_at).is_err());
        let share_id: ShareId = id.parse().expect("an id");
        let key = token::share_key(b"root");
        let grant = ShareGrant { share_id: share_id.clone(), connection: generation, expires_at };
        let macaroon = Macaroon::parse(&grant.to_token(&key)).expect("ours");
        prop_assert_eq!(ShareGrant::check(&macaroon, &key, NOW), Ok(grant));
        let macaroon = Macaroon::parse(&token::share_token(&key, &share_id)).expect("ours");
        prop_assert_eq!(token::check_share_token(&macaroon, &key), Ok(share_id));
    }

    #[test]
    fn requests_for_shares_are_within_their_bounds_or_refused(
        kind in prop::option::of(".{0,5}"), adb in any::<bool>(), description in prop::option::of(".{0,20}"),
        expiry_at in any::<Option<i64>>(), expiry_min in any::<Option<i64>>(), near in any::<bool>(),
    ) {
        let settings = Settings::new(&Config::default(), &BTreeMap::new());
        let closer = |value: i64| if near { NOW + value % 5_000_000 } else { value };
        let post = SharePost {
            kind: if adb { Some("adb".into()) } else { kind },
            description,
            expiry_at: expiry_at.map(closer),
            expiry_min,
        };
        if let Ok(wanted) = shares::check(NOW, &post, &settings) {
            let session: SessionId = "s1".parse().expect("id");
            let id: ShareId = "s1-x".parse().expect("id");
            let shares = shares::Shares::default().with(NOW, &session, id.clone(), &wanted, 5).expect("room");
            let share = shares.get(NOW, &id).expect("it lives at first");
            prop_assert!(share.base.expiry_at > NOW && share.base.expiry_at <= NOW + 30 * 86_400);
            prop_assert!(shares.get(share.base.expiry_at, &id).is_none());
        }
    }

    #[test]
    fn items_that_are_accepted_can_be_shown_and_set_again(name in proptest::sample::select(&[
        "accounts.token_days", "cors.origins", "limits.requests_per_second", "sessions.idle_time_min",
        "shares.default_minutes", "shares.max_days", "shares.per_session", "moon",
    ][..]), text in ".{0,20}", number in any::<i64>()) {
        for value in [text, number.to_string(), (number % 100).to_string(), format!("https://h{number}")] {
            if settings::check(name, &value).is_ok() {
                let set = BTreeMap::from([(name.to_owned(), value)]);
                let shown = Settings::new(&Config::default(), &set).show();
                prop_assert!(settings::check(name, &shown[name]).is_ok());
                prop_assert_eq!(Settings::new(&Config::default(), &shown).show(), shown);
            }
        }
    }

    #[test]
    fn addresses_and_networks_break_nothing(text in ".{0,40}", forwarded in ".{0,80}", peer in any::<[u8; 4]>(), bits in 0..40_u8) {
        let _ = text.parse::<Network>();
        let network: Result<Network, _> = format!("10.0.0.0/{bits}").parse();
        prop_assert_eq!(network.is_ok(), bits <= 32);
        let trusted: Vec<Network> = network.into_iter().collect();
        let client = client_address(std::net::IpAddr::from(peer), &forwarded, &trusted);
        let _ = client_address(client, &text, &trusted);
    }
}
