// The example of the README, and what the types refuse. Arguments: address, key.
import { createClient, type Schemas } from "two-tower-rec";

const [baseUrl, key] = process.argv.slice(2);
if (baseUrl === undefined || key === undefined) throw new Error("Usage: node example.js URL KEY");
const client = createClient({ baseUrl, key });

const { data, error } = await client.POST("/v1/recommend", { body: { k: 3, diversity: 0.3 } });
if (error) throw new Error(error.error.message);
const first: Schemas["RecommendationOut"] | undefined = data.items[0];
if (first === undefined) throw new Error("an empty list");

const similar = await client.GET("/v1/items/{item_id}/similar", {
  params: { path: { item_id: String(first.item_id) }, query: { k: 2 } },
});
const event: Schemas["EventIn"] = { event_id: crypto.randomUUID(), user: "newcomer", item_id: first.item_id };
const stored = await client.POST("/v1/events", { body: { events: [event] } });

// @ts-expect-error no such path
void (() => client.GET("/v1/recommend"));
// @ts-expect-error a text in the place of a number
void (() => client.POST("/v1/recommend", { body: { k: "3" } }));
// @ts-expect-error no such field
void (() => ({ users: "u" }) satisfies Schemas["RecommendIn"]);
// @ts-expect-error no such field in an answer
void (() => data.itens);

console.log(JSON.stringify({ items: data.items.length, similar: similar.data?.items.length, stored: stored.data }));
