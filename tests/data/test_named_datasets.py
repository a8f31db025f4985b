"""Test the datasets that are known by name: rows in the published form of each are read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from twotower.cli import main
from twotower.data.named_datasets import named_dataset, names
from twotower.data.prepare import SOURCES, open_engine
from twotower.data.sources.account import Rejects
from twotower.utils.config import load_config

Files = Mapping[str, str | bytes]


def lines(*rows: str) -> str:
    return "\n".join(rows) + "\n"


def json_lines(*rows: dict[str, Any]) -> bytes:
    return gzip.compress(lines(*map(json.dumps, rows)).encode())


def python_dicts(*rows: dict[str, Any]) -> bytes:
    return gzip.compress(lines(*map(repr, rows)).encode())


def amazon_2014() -> Files:
    review = {
        "reviewerID": "A1YJEY40YUW4SE",
        "asin": "7806397051",
        "reviewerName": "Andrea",
        "helpful": [3, 4],
        "reviewText": "Very oily and creamy.\nNot for me.",
        "overall": 1.0,
        "summary": "Don't waste your money",
        "unixReviewTime": 1391040000,
        "reviewTime": "01 30, 2014",
    }
    item = {
        "asin": "7806397051",
        "description": 'A palette with "15" colours',
        "title": "WAWO 15 Color Professional Makeup Eyeshadow",
        "imUrl": "http://ecx.images-amazon.com/images/I/x.jpg",
        "salesRank": {"Beauty": 12},
        "categories": [["Beauty", "Makeup", "Face"]],
        "price": 8.0,
        "related": {"also_bought": ["B004756YJA"]},
        "brand": "Xtreme",
    }
    other = {"asin": "9759091062", "title": "Oil", "categories": [["Beauty", "Hair Care"]]}
    rows = [review, {**review, "reviewerID": "A60XNB876KYML", "asin": "9759091062", "overall": 3.0}]
    return {"reviews_Beauty_5.json.gz": json_lines(*rows), "meta_Beauty.json.gz": python_dicts(item, other)}


def amazon_2018() -> Files:
    review = {
        "overall": 5.0,
        "verified": True,
        "reviewTime": "09 1, 2016",
        "reviewerID": "A3CIUOJXQ5VDQ2",
        "asin": "B0000530HU",
        "style": {"Size:": " 7.0 oz", "Flavor:": " Classic Ice Blue"},
        "reviewerName": "Shelly F",
        "reviewText": "As advertised. Reasonably priced",
        "summary": "Five Stars",
        "unixReviewTime": 1472688000,
    }
    item = {
        "category": ["Beauty", "Shaving"],
        "tech1": "",
        "description": ["Aftershave", "for men"],
        "fit": "",
        "title": "Aqua Velva",
        "also_buy": ["B00028LYVK"],
        "brand": "Aqua Velva",
        "feature": [],
        "rank": "2,938,573 in Beauty & Personal Care (",
        "main_cat": "All Beauty",
        "date": "",
        "price": "$12.99 - $15.99",
        "details": {"Shipping Weight:": "3 ounces"},
        "asin": "B0000530HU",
        "imageURL": [],
    }
    many = [{**item, "asin": f"B{n:09d}"} for n in range(30)]
    return {
        "All_Beauty_5.json.gz": json_lines(review, {**review, "reviewerID": "A3H7T87S984REU", "vote": "5"}),
        "meta_All_Beauty.json.gz": json_lines(item, *many, item),
    }


def amazon_2023() -> Files:
    review = {
        "rating": 5.0,
        "title": "Such a lovely scent",
        "text": "This spray is really nice.",
        "images": [{"small_image_url": "https://m.media-amazon.com/1.jpg", "attachment_type": "IMAGE"}],
        "asin": "B00YQ6X8EO",
        "parent_asin": "B00YQ6X8EP",
        "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
        "timestamp": 1588687728923,
        "helpful_vote": 0,
        "verified_purchase": True,
    }
    item = {
        "main_category": "All Beauty",
        "title": "Herbivore Sea Mist",
        "average_rating": 4.3,
        "rating_number": 384,
        "features": ["For wavy hair", "Vegan"],
        "description": [],
        "price": None,
        "images": [{"thumb": "https://m.media-amazon.com/2.jpg", "variant": "MAIN"}],
        "videos": [],
        "store": "Herbivore Botanicals",
        "categories": ["Beauty", "Hair"],
        "details": {"UPC": "670555672440"},
        "parent_asin": "B00YQ6X8EP",
        "bought_together": None,
    }
    return {
        "All_Beauty.jsonl.gz": json_lines(review),
        "meta_All_Beauty.jsonl.gz": json_lines(item, {**item, "parent_asin": "B0", "price": 9.5}),
    }


def foursquare(city: str) -> Files:
    rows = lines(
        "470\t49bbd6c0f964a520f4531fe3\t4bf58dd8d48988d127951735\tArts & Crafts Store\t40.719810375488535\t-74.00258103213994\t-240"
        "\tTue Apr 03 18:00:09 +0000 2012",
        "979\t4a43c0aef964a520c6a61fe3\t4bf58dd8d48988d1df941735\tCafé\t40.606799581406435\t-74.04416981025437\t-240"
        "\tTue Apr 03 18:00:25 +0000 2012",
    )
    return {f"dataset_TSMC2014_{city}.txt": rows.encode("latin-1")}


def goodreads() -> Files:
    event = {
        "user_id": "8842281e1d1347389f2ab93d60773d4d",
        "book_id": "836610",
        "review_id": "6b4db26aafeaf0da77c7de6214331e1e",
        "is_read": False,
        "rating": 0,
        "review_text_incomplete": "",
        "date_added": "Fri Sep 08 10:44:24 -0700 2017",
        "date_updated": "Fri Sep 08 10:44:24 -0700 2017",
        "read_at": "",
        "started_at": "",
    }
    book = {
        "isbn": "",
        "text_reviews_count": "1",
        "series": [],
        "country_code": "US",
        "language_code": "eng",
        "popular_shelves": [{"count": "58", "name": "to-read"}],
        "is_ebook": "false",
        "average_rating": "4.12",
        "description": "The chaos continues.",
        "format": "Paperback",
        "authors": [{"author_id": "37450", "role": ""}],
        "publisher": "Dark Horse",
        "num_pages": "146",
        "book_id": "836610",
        "ratings_count": "51",
        "title": "The Switchblade Kiss",
    }
    return {
        "goodreads_interactions_comics_graphic.json.gz": json_lines(event),
        "goodreads_books_comics_graphic.json.gz": json_lines(book, {**book, "book_id": "7648967", "num_pages": ""}),
    }


def gowalla() -> Files:
    rows = lines(
        "0\t2010-10-19T23:55:27Z\t30.2359091167\t-97.7951395833\t22847",
        "0\t2010-10-18T22:17:43Z\t30.2691029532\t-97.7493953705\t420315",
    )
    return {"loc-gowalla_totalCheckins.txt.gz": gzip.compress(rows.encode())}


def h_and_m() -> Files:
    article = (
        "article_id,product_code,prod_name,product_type_no,product_type_name,product_group_name,graphical_appearance_no,"
        "graphical_appearance_name,colour_group_code,colour_group_name,perceived_colour_value_id,perceived_colour_value_name,"
        "perceived_colour_master_id,perceived_colour_master_name,department_no,department_name,index_code,index_name,"
        "index_group_no,index_group_name,section_no,section_name,garment_group_no,garment_group_name,detail_desc"
    )
    row = (
        "0663713001,0663713,Atlanta Push Body Harlow,283,Underwear body,Underwear,1010016,Solid,09,Black,4,Dark,5,Black,"
        '1338,Expressive Lingerie,B,Lingeries/Tights,1,Ladieswear,61,Womens Lingerie,1017,"Under-, Nightwear","Lace body, lined."'
    )
    user = "000058a12d5b43e67d225668fa1f8d618c13dc232df0cad8ffe7ad4a1091e318"
    return {
        "transactions_train.csv": lines(
            "t_dat,customer_id,article_id,price,sales_channel_id", f"2018-09-20,{user},0663713001,0.0508305084745762,2"
        ),
        "articles.csv": lines(article, row),
        "customers.csv": lines(
            "customer_id,FN,Active,club_member_status,fashion_news_frequency,age,postal_code", f"{user},,,ACTIVE,NONE,25.0,2973abc5"
        ),
    }


def yelp_kaggle_csv() -> Files:
    business = "FYWN1wneV18bWNgQjJ2GNg"
    return {
        "yelp_review.csv": lines(
            '"review_id","user_id","business_id","stars","date","text","useful","funny","cool"',
            f'"vkVSCC7xljjrAI4UGfnKEQ","bv2nCi5Qv5vroFiqKGopiw","{business}","5","2016-05-28","Super ""simple"" place\n\nbut good, '
            'yes.","0","0","0"',
        ),
        "yelp_business.csv": lines(
            "business_id,name,neighborhood,address,city,state,postal_code,latitude,longitude,stars,review_count,is_open,categories",
            f'{business},"""Dental by Design""",,"""4855 E Warner Rd, Ste B9""",Ahwatukee,AZ,85044,33.3306902,-111.97,4.0,22,1,'
            "Dentists;General Dentistry",
        ),
        "yelp_user.csv": lines(
            "user_id,name,review_count,yelping_since,friends,useful,funny,cool,fans,elite,average_stars",
            'bv2nCi5Qv5vroFiqKGopiw,Johnny,8,2014-05-11,"oeMvJh94PiGQnx_6GlndPQ, wm1z1PaJKvHgSDRKfwhfDg",0,0,0,0,None,4.67',
        ),
    }


def movielens_csv() -> Files:
    return {
        "ratings.csv": lines("userId,movieId,rating,timestamp", "1,2,3.5,1112486027", "1,29,0.5,1112484676"),
        "movies.csv": lines(
            "movieId,title,genres",
            "2,Jumanji (1995),Adventure|Children|Fantasy",
            '29,"City of Lost Children, The (1995)",Adventure|Drama',
        ),
        "tags.csv": lines("userId,movieId,tag,timestamp", "18,4141,Mark Waters,1240597180"),
    }


FORMS: dict[str, Callable[[], Files]] = {
    "amazon-2014": amazon_2014,
    "amazon-2018": amazon_2018,
    "amazon-2023": amazon_2023,
    "foursquare-nyc": lambda: foursquare("NYC"),
    "foursquare-tokyo": lambda: foursquare("TKY"),
    "goodreads": goodreads,
    "gowalla": gowalla,
    "h-and-m": h_and_m,
    "lastfm-2k": lambda: {
        "user_artists.dat": "userID\tartistID\tweight\r\n2\t51\t13883\r\n2\t52\t11690\r\n",
        "artists.dat": 'id\tname\turl\tpictureURL\r\n51\tDuran "Duran\thttp://www.last.fm/music/D\thttp://x/1.png\r\n52\tMorcheeba\thttp://y\t\r\n',
    },
    "lastfm-360k": lambda: {
        "usersha1-artmbid-artname-plays.tsv": lines(
            "00000c289a1829a808ac09c00daf10bc3c4e223b\t3bd73256-3905-4f3a-97e2-8b341527f805\tbetty blowtorch\t2137",
            '00000c289a1829a808ac09c00daf10bc3c4e223b\t\t"weird al" yankovic\t1',
        ),
        "usersha1-profile.tsv": lines("00000c289a1829a808ac09c00daf10bc3c4e223b\tf\t22\tGermany\tFeb 1, 2007"),
    },
    "movielens-100k": lambda: {
        "u.data": lines("196\t242\t3\t881250949", "186\t302\t3\t891717742"),
        "u.item": "".join(
            f"{movie}|{title}|24-Jan-1997||http://us.imdb.com/M/title-exact?x|{'|'.join(['0'] * 5 + ['1'] + ['0'] * 13)}\n"
            for movie, title in (("242", "Kolya (1996)"), ("302", "L.A. Confidential (1997)"), ("543", "Misérables, Les (1995)"))
        ).encode("latin-1"),
        "u.user": lines("196|49|M|writer|55105", "186|39|F|executive|00000"),
    },
    "movielens-1m": lambda: {
        "ratings.dat": lines("1::1193::5::978300760", "1::661::3::978302109"),
        "movies.dat": lines(
            "1193::One Flew Over: The Cuckoo's Nest (1975)::Drama", "661::Misérables, Les (1995)::Drama|Musical"
        ).encode("latin-1"),
        "users.dat": lines("1::F::1::10::48067"),
    },
    "movielens-20m": movielens_csv,
    "movielens-32m": movielens_csv,
    "otto": lambda: {
        "otto-recsys-train.jsonl": lines(
            '{"session": 42, "events": [{"aid": 0, "ts": 1661200010000, "type": "clicks"}, '
            '{"aid": 1, "ts": 1661200020000, "type": "clicks"}, {"aid": 2, "ts": 1661200030000, "type": "carts"}]}',
            '{"session":43,"events":[{"aid":1517085,"ts":1659304800025,"type":"orders"}]}',
        ),
        "otto-recsys-test.jsonl": lines('{"session": 99, "events": [{"aid": 0, "ts": 1661200010000, "type": "clicks"}]}'),
    },
    "retailrocket": lambda: {
        "events.csv": lines(
            "timestamp,visitorid,event,itemid,transactionid",
            "1433221332117,257597,view,355908,",
            "1433222276276,599528,transaction,356475,4000",
        ),
        "item_properties_part1.csv": lines(
            "timestamp,itemid,property,value",
            "1435460400000,460429,categoryid,1338",
            "1441508400000,206783,888,1116713 960601 n277.200",
            "1439089200000,395014,400,n552.000 639502 n720.000 424566",
            "1431226800000,356475,available,1",
            "1433041200000,356475,categoryid,20",
        ),
        "item_properties_part2.csv": lines(
            "timestamp,itemid,property,value",
            "1432436400000,356475,categoryid,10",
            "1442113200000,356475,available,0",
            "1433041200000,460429,790,n8520.000",
        ),
    },
    "steam": lambda: {
        "steam_reviews.json.gz": python_dicts(
            {
                "username": "Chaos Syren",
                "hours": 0.1,
                "products": 41,
                "product_id": "725280",
                "page_order": 0,
                "date": "2017-12-17",
                "text": 'It\'s "fine"',
                "early_access": False,
                "page": 1,
            }
        ),
        "steam_games.json.gz": python_dicts(
            {
                "publisher": "Kotoshiro",
                "genres": ["Action", "Casual"],
                "app_name": "Kitty",
                "url": "http://store.steampowered.com/app/725280/",
                "release_date": "2018-01-04",
                "tags": ["Indie"],
                "discount_price": 4.49,
                "specs": ["Single-player"],
                "price": "Free to Play",
                "early_access": False,
                "id": "725280",
                "developer": "Kotoshiro",
            },
            *({"app_name": f"Game {n}", "genres": ["Indie"], "id": str(n)} for n in range(200)),
            {"app_name": "No id", "genres": ["Indie"]},
        ),
    },
    "yelp": lambda: {
        "yelp_academic_dataset_business.json": lines(
            json.dumps(
                {
                    "business_id": "Pns2l4eNsfO8kk83dixA6A",
                    "name": "Abby Rappoport, LAC, CMQ",
                    "address": "1616 Chapala St, Ste 2",
                    "city": "Santa Barbara",
                    "state": "CA",
                    "postal_code": "93101",
                    "latitude": 34.4266787,
                    "longitude": -119.7111968,
                    "stars": 5.0,
                    "review_count": 7,
                    "is_open": 1,
                    "attributes": {"WiFi": "u'free'", "RestaurantsPriceRange2": "2"},
                    "categories": "Doctors, Health & Medical",
                    "hours": {"Monday": "8:0-18:30"},
                }
            )
        ),
        "yelp_academic_dataset_review.json": lines(
            json.dumps(
                {
                    "review_id": "KU_O5udG6zpxOg-VcAEodg",
                    "user_id": "mh_-eMZ6K5RLWhZyISBhwA",
                    "business_id": "Pns2l4eNsfO8kk83dixA6A",
                    "stars": 3.0,
                    "useful": 0,
                    "funny": 0,
                    "cool": 0,
                    "text": "If you decide to eat here",
                    "date": "2018-07-07 22:09:11",
                }
            )
        ),
    },
    "yelp-kaggle-csv": yelp_kaggle_csv,
}

READ: dict[str, tuple[int, tuple[str, str, str, float | None], tuple[str, str | None]]] = {
    # events; the first one: user, item, time, stars; one item: id, name
    "amazon-2014": (2, ("A1YJEY40YUW4SE", "7806397051", "2014-01-30", 1), ("9759091062", "Oil")),
    "amazon-2018": (2, ("A3CIUOJXQ5VDQ2", "B0000530HU", "2016-09-01", 5), ("B0000530HU", "Aqua Velva")),
    "amazon-2023": (
        1,
        ("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8EP", "2020-05-05T14:08:48", 5),
        ("B00YQ6X8EP", "Herbivore Sea Mist"),
    ),
    "foursquare-nyc": (2, ("470", "49bbd6c0f964a520f4531fe3", "2012-04-03T18:00:09", None), ("4a43c0aef964a520c6a61fe3", None)),
    "foursquare-tokyo": (2, ("470", "49bbd6c0f964a520f4531fe3", "2012-04-03T18:00:09", None), ("4a43c0aef964a520c6a61fe3", None)),
    "goodreads": (
        1,
        ("8842281e1d1347389f2ab93d60773d4d", "836610", "2017-09-08T17:44:24", None),
        ("836610", "The Switchblade Kiss"),
    ),
    "gowalla": (2, ("0", "22847", "2010-10-19T23:55:27", None), ("420315", None)),
    "h-and-m": (
        1,
        ("000058a12d5b43e67d225668fa1f8d618c13dc232df0cad8ffe7ad4a1091e318", "0663713001", "2018-09-20", None),
        ("0663713001", "Atlanta Push Body Harlow"),
    ),
    "lastfm-2k": (2, ("2", "51", "", None), ("51", 'Duran "Duran')),
    "lastfm-360k": (2, ("00000c289a1829a808ac09c00daf10bc3c4e223b", "betty blowtorch", "", None), ('"weird al" yankovic', None)),
    "movielens-100k": (2, ("196", "242", "1997-12-04T15:55:49", 3), ("543", "Misérables, Les (1995)")),
    "movielens-1m": (2, ("1", "1193", "2000-12-31T22:12:40", 5), ("661", "Misérables, Les (1995)")),
    "movielens-20m": (2, ("1", "2", "2005-04-02T23:53:47", 3.5), ("29", "City of Lost Children, The (1995)")),
    "movielens-32m": (2, ("1", "2", "2005-04-02T23:53:47", 3.5), ("29", "City of Lost Children, The (1995)")),
    "otto": (4, ("42", "0", "2022-08-22T20:26:50", None), ("1517085", None)),
    "retailrocket": (2, ("257597", "355908", "2015-06-02T05:02:12", None), ("356475", None)),
    "steam": (1, ("Chaos Syren", "725280", "2017-12-17", None), ("725280", "Kitty")),
    "yelp": (
        1,
        ("mh_-eMZ6K5RLWhZyISBhwA", "Pns2l4eNsfO8kk83dixA6A", "2018-07-07T22:09:11", 3),
        ("Pns2l4eNsfO8kk83dixA6A", "Abby Rappoport, LAC, CMQ"),
    ),
    "yelp-kaggle-csv": (
        1,
        ("bv2nCi5Qv5vroFiqKGopiw", "FYWN1wneV18bWNgQjJ2GNg", "2016-05-28", 5),
        ("FYWN1wneV18bWNgQjJ2GNg", '"Dental by Design"'),
    ),
}


def write(folder: Path, files: Files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize("name", names())
def test_rows_in_the_published_form_are_read(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", FORMS[name]())
    config = load_config(None, [f"data.path={folder}"], base=named_dataset(name).settings)
    rejects = Rejects(tmp_path / "rejects.jsonl", config.data.max_reject_frac)
    engine = open_engine(config.prepare, tmp_path / "spill")
    try:
        raw = SOURCES[config.data.source](config.data, engine, rejects)
        rejects.check()
        events = raw.interactions.order_by("order").to_pyarrow().to_pylist()
        items = {row["item_id"]: row for row in raw.items.to_pyarrow().to_pylist()}
    finally:
        rejects.close()
        engine.close()
    count, (user, item, time, stars), (shown, called) = READ[name]
    assert len(events) == count
    first = events[0]
    assert (first["user_id"], first["item_id"], first["stars"]) == (user, item, stars)
    assert raw.has_time == bool(time)
    assert not time or first["time_s"] == int(datetime.fromisoformat(time).replace(tzinfo=UTC).timestamp())
    assert items[shown]["name"] == called and item in items
    columns = {column for spec in raw.features if spec.side == "item" for column in spec.columns}
    assert all(any(row[column] not in (None, []) for row in items.values()) for column in columns), "a feature is empty for all"


def test_every_dataset_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(FORMS) == set(READ) == set(names())
    assert main(["datasets"]) == 0
    out = capsys.readouterr().out
    assert all(len(line) <= 80 or line.strip().startswith("http") for line in out.splitlines())
    for name in names():
        known = named_dataset(name)
        assert known.address in out and known.path == Path("data") / name
        assert all(not known or known.split(":")[0] in ("md5", "sha256") for _, known in known.files)
        assert main(["datasets", "config", name]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == known.settings


def test_a_dataset_is_prepared_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--data", "movielens-1m", "--out", "set"]) == 2
    assert "Run: twotower datasets get movielens-1m" in capsys.readouterr().err
    rows = [f"{n % 9 + 1}::{n % 7 + 1}::{n % 5 + 1}::{978300760 + 9000 * n}" for n in range(300)]
    files = {
        "ratings.dat": lines(*rows),
        "movies.dat": lines(*(f"{n}::Film {n} (1990)::Drama|Comedy" for n in range(1, 8))),
        "users.dat": lines(*(f"{n}::F::1::{n}::48067" for n in range(1, 10))),
    }
    write(tmp_path / "data" / "movielens-1m", files)
    assert main(["prepare", "--data", "movielens-1m", "--out", "set"]) == 0
    out, err = capsys.readouterr()
    assert "300 events of 9 users at 7 movies" in out and "Dataset: MovieLens 1M" in err
    write(tmp_path / "elsewhere", files)
    assert main(["prepare", "--data", "movielens-1m", "--set", "data.path=elsewhere", "--out", "set2"]) == 0


def test_the_newest_properties_of_retailrocket_count(tmp_path: Path) -> None:
    folder = write(tmp_path / "raw", FORMS["retailrocket"]())
    config = load_config(None, [f"data.path={folder}"], base=named_dataset("retailrocket").settings)
    rejects = Rejects(tmp_path / "rejects.jsonl", config.data.max_reject_frac)
    engine = open_engine(config.prepare, tmp_path / "spill")
    try:
        raw = SOURCES["tables"](config.data, engine, rejects)
        rejects.check()
        items = raw.items.to_pyarrow().to_pylist()
    finally:
        rejects.close()
        engine.close()
    found = {row["item_id"]: (row["categoryid"], row["available"]) for row in items}
    assert found == {
        "460429": ("1338", None),
        "206783": (None,) * 2,
        "395014": (None,) * 2,
        "356475": ("20", 0),
        "355908": (None,) * 2,
    }
    assert raw.described == () and [spec.name for spec in raw.features] == ["category"]
    rows = {name: file.rows for name, file in rejects.files.items()}
    assert rows == {"events.csv": 2, "item_properties_part1.csv": 5, "item_properties_part2.csv": 3}
