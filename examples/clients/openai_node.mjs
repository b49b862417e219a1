// OpenAI's client for JavaScript: a chat, a stream, the Responses API.
//
//     npm install openai
//     node examples/clients/openai_node.mjs http://127.0.0.1:8000

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.argv[2]}/v1`, apiKey: process.env.ISTHMUS_API_KEY ?? "none" });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Name a city by the sea." }];

const answer = await client.chat.completions.create({ model, messages, max_tokens: 60 });
console.log("chat      ", answer.choices[0].message.content, answer.usage.total_tokens, "tokens");

let text = "";
const stream = await client.chat.completions.create({ model, messages, max_tokens: 60, stream: true });
for await (const chunk of stream) text += chunk.choices[0]?.delta?.content ?? "";
console.log("stream    ", text);

const response = await client.responses.create({ model, input: "Name a city by the sea.", max_output_tokens: 60 });
console.log("responses ", response.output_text, response.usage.total_tokens, "tokens");
